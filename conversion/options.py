"""Options of a command: fields of dataclasses, each declared once.

The field gives the option on the command line (`HfArgumentParser`), its line of help, the check of its
value, and the entry in a result's record. Bounds are part of the type: `Annotated[int, Range(ge=1)]`.
"""

import inspect
from dataclasses import MISSING, Field, fields
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    get_args,
    get_origin,
    get_type_hints,
)

Dtype = Literal["auto", "bfloat16", "float16", "float32"]


class Range(NamedTuple):
    """Bounds of a number; the names are those of pydantic's fields."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def allows(self, value: float) -> bool:
        """Return whether a number lies within the bounds; NaN never does."""
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def __str__(self) -> str:
        """Return the bounds in words."""
        lower = f"at least {self.ge:g}" if self.ge is not None else None
        lower = f"more than {self.gt:g}" if self.gt is not None else lower
        upper = f"at most {self.le:g}" if self.le is not None else None
        upper = f"less than {self.lt:g}" if self.lt is not None else upper
        return " and ".join(bound for bound in (lower, upper) if bound)


class Options:
    """Base class of a command's options; each subclass is a dataclass.

    In a command's first class the fields without a default are its positional arguments, in order. A field
    with `kw_only=True` and no default is an option that must be given. `title` heads the class's part of
    the help.
    """

    title: ClassVar[str] = "options"

    def __post_init__(self) -> None:
        """Raise a ValueError for a value that its field does not allow."""
        check_options(self)


def own_fields(options: type) -> list[Field[Any]]:
    """Return the fields that `Options` declare, in order; those of `TrainingArguments` are left out."""
    own = {
        name
        for base in options.__mro__
        if issubclass(base, Options)
        for name in inspect.get_annotations(base)
    }
    return [field for field in fields(options) if field.name in own]


def check_options(options: Any) -> None:
    """Check the fields of `own_fields` against the choices and bounds of their types.

    Raises:
        ValueError: names the field, the value and what is allowed.
    """
    hints = get_type_hints(type(options), include_extras=True)
    for field in own_fields(type(options)):
        value = getattr(options, field.name)
        values = value if isinstance(value, list | tuple) else [value]
        for part in _parts(hints[field.name]):
            for one in values:
                _check(field.name, one, part)


def _check(name: str, value: Any, part: Any) -> None:
    if value is None:
        return
    if isinstance(part, Range) and not part.allows(value):
        raise ValueError(f"{name} must be {part}, got {value!r}.")
    if get_origin(part) is Literal and value not in get_args(part):
        choices = ", ".join(map(str, get_args(part)))
        raise ValueError(f"{name} must be one of {choices}; got {value!r}.")


def _parts(hint: Any) -> list[Any]:
    """Return the types, choices and bounds in a hint such as `list[Annotated[int, Range(ge=1)]]`."""
    if get_origin(hint) is Annotated:
        base, *extras = get_args(hint)
        return [*_parts(base), *extras]
    if get_origin(hint) is Literal:
        return [hint]
    arguments = get_args(hint)
    return [part for argument in arguments for part in _parts(argument)] or [hint]


def is_required(field: Field[Any]) -> bool:
    """Return whether a field has no default."""
    return field.default is MISSING and field.default_factory is MISSING


def is_argument(field: Field[Any]) -> bool:
    """Return whether a field of a command's first class is a positional argument."""
    return is_required(field) and not field.kw_only
