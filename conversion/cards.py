"""Model cards, filled from a checkpoint, the record of how it was made, and its benchmark results."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import requires
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError
from safetensors import safe_open
from transformers import AutoConfig

from modeling_lmtp.pretrained_lmtp import TAGS
from modeling_lmtp.transformers_lmtp import TESTED

from .measured import read_measured
from .options import Options
from .repository import Form, check_hub_id, form_of
from .saving import PROVENANCE, read_json
from .vllm_serving import card_notes

TEMPLATES = Path(__file__).parent.parent / "hub_cards"
LIBRARIES = {"full": "transformers", "heads": "transformers", "adapter": "peft"}
# The Hub has no relation for heads; like an adapter, they need their base model
RELATIONS = {"full": "finetune", "heads": "adapter", "adapter": "adapter"}
READS = {
    "last": "the last hidden state",
    "weighted": "the last hidden state, and a learned mean of the states of all layers",
}
NEEDED_PACKAGES = ("torch", "transformers")


@dataclass
class CardOptions(Options):
    """What the model card says that no file of the checkpoint does."""

    title: ClassVar[str] = "model card"

    license: str = field(
        kw_only=True, metadata={"help": "The Hub's identifier of the license, such as apache-2.0."}
    )
    language: list[str] = field(
        kw_only=True, metadata={"help": "ISO 639 codes of the model's languages, such as en."}
    )
    datasets: list[str] = field(
        default_factory=list,
        metadata={"help": "Hub ids of the training data; none if the model wrote it."},
    )
    results: list[Path] = field(
        default_factory=list, metadata={"help": "Files that `lmtp bench --output` wrote."}
    )
    tag: str = field(
        default="v1", metadata={"help": "New tag of the commit; the card loads this revision."}
    )


def build_card(folder: Path, repo_id: str, options: CardOptions) -> ModelCard:
    """Build the card of a checkpoint.

    Args:
        folder: a checkpoint of any form, with its `provenance.json`.
        repo_id: where the checkpoint is, or will be, on the Hub.
        options: what the checkpoint does not say.

    Raises:
        ValueError: something that the card must say is unknown, a figure lacks its conditions, or a
            file is malformed; the message says which.
    """
    form = form_of(folder)
    check_hub_id(repo_id, "REPO_ID")
    base_model, base_revision, config = base_of(folder, form)
    base_model = check_hub_id(
        base_model,
        f"base_model_name_or_path in {'adapter_config' if form == 'adapter' else 'config'}.json, or "
        "publish with --base_model",
    )
    data = ModelCardData(
        library_name=LIBRARIES[form],
        pipeline_tag="text-generation",
        base_model=base_model,
        base_model_relation=RELATIONS[form],
        license=options.license,
        datasets=options.datasets or None,
        language=options.language,
        tags=list(TAGS),
    )
    text = fill_template(
        form,
        {
            "repo_id": repo_id,
            "tag": options.tag,
            "license": options.license,
            "language": ", ".join(options.language),
            "base_model": base_model,
            "base_revision": base_revision,
            "requires": needed_packages(form),
            "tested": TESTED,
            "vllm": card_notes(repo_id, form, base_model, config),
            "heads": describe_heads(config, folder),
            "measured": [read_measured(path, config) for path in options.results],
            "training": describe_training(folder, options.datasets),
        },
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def base_of(folder: Path, form: Form) -> tuple[str | None, str | None, Any]:
    """Return the base model that a checkpoint names, its revision, and the `LMTPConfig` of its heads."""
    if form != "adapter":
        config = AutoConfig.from_pretrained(folder)
        return config.base_model_name_or_path, config.base_model_revision, config
    adapter = read_json(folder / "adapter_config.json")
    base, revision = adapter.get("base_model_name_or_path"), adapter.get("revision")
    # Publishing records the heads' configuration, so that the card does not need the base model
    heads = read_json(_provenance(folder)).get("lmtp_config")
    config = AutoConfig.for_model(**heads) if heads else AutoConfig.from_pretrained(base)
    return base, revision, config


def fill_template(form: Form, values: dict[str, Any]) -> str:
    """Fill the card template of a form.

    Raises:
        ValueError: the template has a placeholder without a value; the message names it.
    """
    known = {name: value for name, value in values.items() if value not in (None, "")}
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    try:
        return environment.get_template(f"{form}.md").render(known)
    except UndefinedError as error:
        raise ValueError(
            f"The card for {form!r} has a placeholder without a value: {error.message}. Pass the value as "
            "an option of the command, or add it to the checkpoint's files."
        ) from error


def needed_packages(form: Form) -> str:
    """Return the packages, with their versions, that loading the model needs."""
    names = (*NEEDED_PACKAGES, "peft") if form == "adapter" else NEEDED_PACKAGES
    requirements = [text for text in requires("modeling-lmtp") or () if text.startswith(names)]
    return ", ".join(f"`{text}`" for text in requirements)


def describe_heads(config: Any, folder: Path) -> list[tuple[str, str]]:
    """Return the heads' properties, as names and values."""
    context = {
        0: "nothing after its state (the paper's head)",
        "path": "all tokens up to its target, including those drafted before it",
    }.get(
        config.head_context,
        f"the first {config.head_context} known tokens after its state",
    )
    if config.share_lm_head:
        rank = config.lm_head_rank
        unembedding = f"the model's own, plus rank {rank} per head" if rank else "the model's own"
    else:
        unembedding = "one per head"
    drafts = config.draft_token_ids
    rows = [
        ("leap offsets", ", ".join(map(str, config.leap_offsets)) or "none"),
        ("each head reads", READS[config.head_input]),
        ("each head also sees", context),
        ("residual blocks per head", str(config.num_head_layers)),
        ("unembedding", unembedding),
        (
            "tokens the heads can draft",
            "all" if drafts is None else f"{len(drafts):,} of them",
        ),
    ]
    parameters = sum(_head_sizes(folder))
    return [*rows, ("parameters of the heads", f"{parameters:,}")] if parameters else rows


def _head_sizes(folder: Path) -> list[int]:
    sizes = []
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            slices = [file.get_slice(name) for name in file.keys() if "leap_heads." in name]  # noqa: SIM118
            for shape in (piece.get_shape() for piece in slices):
                count = 1
                for length in shape:
                    count *= length
                sizes.append(count)
    return sizes


def describe_training(folder: Path, datasets: Sequence[str]) -> list[tuple[str, str]]:
    """Return how a checkpoint was made, as names and values, from its `provenance.json`.

    Raises:
        ValueError: there is no such file, or it does not name the command.
    """
    record = read_json(_provenance(folder))
    if not record.get("command"):
        raise ValueError(f"{_provenance(folder)} does not say which command made the heads.")
    rows = [("command", f"`{record['command']}`")]
    if datasets:
        rows.append(("data", ", ".join(datasets)))
    rows += [
        (name.replace("_", " "), f"`{value}`")
        for name, value in {**record.get("recipe", {}), **_scalars(record)}.items()
        if name != "command"
    ]
    rows += [
        (name.replace("_", " "), f"`{value}`")
        for name, value in _scalars(record.get("settings") or {}).items()
    ]
    if record.get("versions"):
        versions = (f"{name} {text}" for name, text in record["versions"].items())
        rows.append(("versions", ", ".join(versions)))
    return rows


def _scalars(record: dict[str, Any]) -> dict[str, Any]:
    kinds = (str, int, float, bool)
    return {name: value for name, value in record.items() if isinstance(value, kinds)}


def _provenance(folder: Path) -> Path:
    path = folder / PROVENANCE
    if not path.exists():
        raise ValueError(
            f"{folder} has no {PROVENANCE}, so its card could not say how the model was made. The commands "
            "of `lmtp` write one; save your own model with conversion.saving.save_checkpoint."
        )
    return path


def write_card(folder: Path, card: ModelCard) -> Path:
    """Write a card as `README.md`, completely or not at all, and return its path."""
    path, unfinished = folder / "README.md", folder / ".README.md.unfinished"
    try:
        card.save(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path
