"""Model cards, filled from a checkpoint, its record of how it was made, and its result files."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import requires
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError
from safetensors import safe_open
from transformers import AutoConfig

from modeling_lmtp.pretrained_lmtp import TAGS
from modeling_lmtp.transformers_lmtp import TESTED

from .forms import Form, check_hub_id, form_of
from .measured import read_measured
from .saving import PROVENANCE, read_json

TEMPLATES = Path(__file__).parent.parent / "hub_cards"
LIBRARIES = {Form.FULL: "transformers", Form.HEADS: "transformers", Form.ADAPTER: "peft"}
# What the Hub knows: heads alone need their base model as an adapter does
RELATIONS = {Form.FULL: "finetune", Form.HEADS: "adapter", Form.ADAPTER: "adapter"}
READS = {
    "last": "the last hidden state",
    "weighted": "the last hidden state, and a learned mean of those of all layers",
}
NEEDED_PACKAGES = ("torch", "transformers")


@dataclass(frozen=True)
class CardFacts:
    """What no file of a checkpoint says.

    Args:
        repo_id: where the checkpoint is, or will be, on the Hub.
        license: its identifier there, such as `apache-2.0`.
        language: ISO 639 codes of the languages that it speaks.
        datasets: Hub ids of the data that it was trained on; none if it wrote its data itself.
        tag: the revision that the card tells its readers to load.
    """

    repo_id: str
    license: str
    language: Sequence[str]
    datasets: Sequence[str] = ()
    tag: str = "v1"


def build_card(folder: Path, facts: CardFacts, results: Sequence[Path] = ()) -> ModelCard:
    """Make the card of a checkpoint.

    Args:
        folder: a checkpoint of any form, with its `provenance.json`.
        facts: the rest.
        results: files that `lmtp bench` wrote.

    Raises:
        ValueError: something that the card must say is unknown, a figure comes without its
            conditions, or a file is malformed; says which.
    """
    form = form_of(folder)
    check_hub_id(facts.repo_id, "--repo-id")
    base_model, base_revision, config = base_of(folder, form)
    check_hub_id(
        base_model,
        f"base_model_name_or_path in {'adapter_config' if form is Form.ADAPTER else 'config'}.json, or let "
        "`lmtp publish` do so with --base-model",
    )
    data = ModelCardData(
        library_name=LIBRARIES[form],
        pipeline_tag="text-generation",
        base_model=base_model,
        base_model_relation=RELATIONS[form],
        license=facts.license,
        datasets=list(facts.datasets) or None,
        language=list(facts.language),
        tags=list(TAGS),
    )
    text = fill_template(
        form,
        {
            "repo_id": facts.repo_id,
            "tag": facts.tag,
            "license": facts.license,
            "language": ", ".join(facts.language),
            "base_model": base_model,
            "base_revision": base_revision,
            "requires": needed_packages(form),
            "tested": TESTED,
            "heads": describe_heads(config, folder),
            "measured": [read_measured(path, config) for path in results],
            "training": describe_training(folder, facts.datasets),
        },
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def base_of(folder: Path, form: Form) -> tuple[str | None, str | None, Any]:
    """Return the base model that a checkpoint names, its revision, and the `LMTPConfig` of its heads."""
    if form is not Form.ADAPTER:
        config = AutoConfig.from_pretrained(folder)
        return config.base_model_name_or_path, config.base_model_revision, config
    adapter = read_json(folder / "adapter_config.json")
    base, revision = adapter.get("base_model_name_or_path"), adapter.get("revision")
    # The heads' description travels in the record, so that no card needs the base model at hand
    heads = read_json(_provenance(folder)).get("lmtp_config")
    config = AutoConfig.for_model(**heads) if heads else AutoConfig.from_pretrained(base)
    return base, revision, config


def fill_template(form: Form, values: dict[str, Any]) -> str:
    """Fill the card template of a form.

    Raises:
        ValueError: the template has a placeholder without a value; names it.
    """
    known = {name: value for name, value in values.items() if value not in (None, "")}
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    try:
        return environment.get_template(f"{form.value}.md").render(known)
    except UndefinedError as error:
        raise ValueError(
            f"The card for {form.value!r} has a placeholder without a value: {error.message}. Give it "
            "by an option of the command, or in the checkpoint's files."
        ) from error


def needed_packages(form: Form) -> str:
    """Say which packages, and from which version, a reader needs: those that this package requires."""
    names = (*NEEDED_PACKAGES, "peft") if form is Form.ADAPTER else NEEDED_PACKAGES
    found = [text for text in requires("modeling-lmtp") or () if text.startswith(names)]
    return ", ".join(f"`{text}`" for text in found)


def describe_heads(config: Any, folder: Path) -> list[tuple[str, str]]:
    """Return the heads' properties, as names and values."""
    context = {
        0: "nothing that follows its state (the paper's head)",
        "path": "all tokens up to its target, those drafted before it included",
    }.get(
        config.head_context,
        f"of the known tokens that follow its state, the first {config.head_context}",
    )
    if config.share_lm_head:
        rank = config.lm_head_rank
        unembedding = f"the model's own, plus rank {rank} per head" if rank else "the model's own"
    else:
        unembedding = "one of each head's own"
    drafts = config.draft_token_ids
    rows = [
        ("leap offsets", ", ".join(map(str, config.leap_offsets)) or "none"),
        ("each head reads", READS[config.head_input]),
        ("each head sees besides", context),
        ("residual blocks per head", str(config.num_head_layers)),
        ("unembedding", unembedding),
        (
            "tokens that heads propose",
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
        ValueError: there is none, or it does not say by which command.
    """
    record = read_json(_provenance(folder))
    if not record.get("command"):
        raise ValueError(
            f"{_provenance(folder)} does not say by which command the heads were made."
        )
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
            f"{folder} has no {PROVENANCE}, so a card could not say how it was made. The commands of "
            "`lmtp` write one; for a model of your own, save it with save_checkpoint."
        )
    return path


def write_card(folder: Path, card: ModelCard) -> Path:
    """Write a card as the `README.md` of a folder, whole or not at all, and return its path."""
    path, unfinished = folder / "README.md", folder / ".README.md.unfinished"
    try:
        card.save(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path
