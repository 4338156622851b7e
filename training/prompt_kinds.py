"""The kinds of prompts that a model writes itself, for varied training data without any data.

A *kind by system message* lets the model write a user turn under that message. A *kind by task* lets it
write a passage first, and asks for something about that passage, as users do with texts of their own. The
system messages only steer what is written: every prompt is answered under the chat template's default.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

ALL = "all"


@dataclass(frozen=True)
class PromptKind:
    """One kind of self-written prompts.

    Args:
        name: what prompts, answers and evaluations of this kind are labelled with.
        system: the system message under which the model writes the prompt; None leaves it to the chat
            template.
        tasks: for a kind by task, requests that hold `{passage}`, where the passage goes.
    """

    name: str
    system: str | None = None
    tasks: tuple[str, ...] = ()

    @property
    def systems(self) -> tuple[str | None, ...]:
        """Return the system messages under which its prompts, or the passages in them, are written."""
        return PASSAGE_SYSTEMS if self.tasks else (self.system,)


# What is written without naming kinds; its name is older than the others
SELF_WRITTEN = PromptKind("self-written")

# They take turns, so that passages vary in form: prose with facts, with a plot, with names and dates
PASSAGE_SYSTEMS = (
    "You are an encyclopedia. Users name a subject from nature, history, science, geography or culture, "
    "and you describe it in one short paragraph.",
    "You are a storyteller. Users ask for very short stories, scenes and anecdotes, and you write each in "
    "one short paragraph.",
    "You are an office assistant. Users ask you to write short emails, announcements, invitations and "
    "minutes with names, places, dates and amounts.",
    "You are a reporter. Users ask you for short news reports, reviews, portraits and product "
    "descriptions, each in one short paragraph.",
)

_LANGUAGES = ("French", "Spanish", "German", "Italian", "Portuguese", "Dutch")

_KINDS = (
    PromptKind("chat"),
    PromptKind(
        "writing",
        "You are a writing assistant. You help users to write stories, poems, letters, emails, speeches, "
        "articles and advertisements.",
    ),
    PromptKind(
        "knowledge",
        "You are an expert in science, history, geography, medicine and culture. You answer questions "
        "about facts precisely.",
    ),
    PromptKind(
        "code",
        "You are a programming assistant. You write, explain and correct code in Python and other "
        "languages.",
    ),
    PromptKind(
        "roleplay",
        "You play the role that the user gives you: a character, a guide, an interviewer, a customer. "
        "Users set the scene, and you stay in your role.",
    ),
    PromptKind(
        "explanation",
        "You are a patient teacher. You explain concepts, compare ideas, and describe how things work, "
        "step by step and with examples.",
    ),
    PromptKind(
        "math",
        "You are a maths tutor. Users give you word problems and exercises with numbers, and you solve "
        "them step by step.",
    ),
    PromptKind(
        "reasoning",
        "You are an expert in logic. Users give you puzzles, plans to make, decisions to weigh and causes "
        "to find, and you reason step by step.",
    ),
    PromptKind(
        "summary",
        tasks=(
            "Summarize the following text.\n\n{passage}",
            "Summarize this in one sentence:\n\n{passage}",
            "{passage}\n\nGive a short summary of the text above.",
            "Write a summary of this text in two or three sentences.\n\n{passage}",
            "Can you tell me briefly what this says?\n\n{passage}",
        ),
    ),
    PromptKind(
        "translation",
        tasks=(
            *(f"Translate the following text into {name}.\n\n{{passage}}" for name in _LANGUAGES),
            *(f"{{passage}}\n\nHow do you say this in {name}?" for name in _LANGUAGES),
        ),
    ),
    PromptKind(
        "extraction",
        tasks=(
            "List all names of people, places and organizations in this text.\n\n{passage}",
            "Extract the facts from the following text as a JSON object.\n\n{passage}",
            "{passage}\n\nList every date, number and amount that the text above mentions.",
            "Put the information in this text into a table.\n\n{passage}",
            "Which keywords describe this text? Answer with a list of words from the text.\n\n{passage}",
        ),
    ),
    PromptKind(
        "key_points",
        tasks=(
            "List the key points of the following text.\n\n{passage}",
            "{passage}\n\nWhat are the main points of this text? Answer with bullet points.",
            "Turn this text into short notes.\n\n{passage}",
            "Which three things should I remember from this text?\n\n{passage}",
        ),
    ),
    PromptKind(
        "rewriting",
        tasks=(
            "Correct the spelling, grammar and style of the following text.\n\n{passage}",
            "Rewrite the following text in simpler words.\n\n{passage}",
            "{passage}\n\nMake this text more formal.",
            "Rewrite this text so that it is shorter, and keep its meaning.\n\n{passage}",
            "Paraphrase this text.\n\n{passage}",
            "Rewrite this as a friendly message to a colleague.\n\n{passage}",
        ),
    ),
    PromptKind(
        "questions",
        tasks=(
            "{passage}\n\nWhat is this text about, and who or what does it mention?",
            "Write three questions about the following text, and answer them.\n\n{passage}",
            "Read this text and answer: what happens, where, and why?\n\n{passage}",
            "{passage}\n\nWhat can I conclude from this text? Quote the sentences that say so.",
            "Text: {passage}\n\nQuestion: What is the most important fact in the text?",
        ),
    ),
)
KINDS = {kind.name: kind for kind in _KINDS}


def prompt_kinds(names: Iterable[str]) -> list[PromptKind]:
    """Return the kinds of these names in the order of `KINDS`; without names, only `SELF_WRITTEN`.

    Raises:
        ValueError: a name is neither a kind nor `ALL`.
    """
    names = set(names)
    if unknown := sorted(names - {ALL, *KINDS}):
        raise ValueError(
            f"kinds must be {ALL}, or some of {', '.join(KINDS)}; got {', '.join(unknown)}."
        )
    if not names:
        return [SELF_WRITTEN]
    return [kind for kind in _KINDS if ALL in names or kind.name in names]
