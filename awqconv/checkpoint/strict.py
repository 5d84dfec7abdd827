"""JSON as hostile input: one value or one AwqconvError, in bounded time and memory."""

import json
from collections import Counter
from collections.abc import Callable

from awqconv.errors import AwqconvError

MAX_VALUES = 4_000_000  # 400,000 tensors; the largest real checkpoints have 150,000


def shown(text: str, limit: int = 120) -> str:
    """A name from a file as a message may print it: one short line without control characters."""
    short = text if len(text) <= limit else f"{text[: limit - 20]}...{text[-17:]}"
    return short if short.isprintable() else ascii(short)


def parse_json(raw: bytes, where: str, fix: str, *, floats: bool = True) -> object:
    """The value of a UTF-8 JSON text. Repeated keys and lone surrogates are refused everywhere.

    `floats=False` also refuses every number but a plain integer of at most 20 digits, so what is
    accepted means the same to any JSON parser. With floats, NaN and Infinity pass: Python's
    writers put them into real config.json files.

    Raises AwqconvError(where, fix) for everything else, nesting and size included.
    """

    def refuse(what: str) -> AwqconvError:
        return AwqconvError(what, where, fix)

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise refuse(f"the key {shown(twice)!r} is there twice in one JSON object")
        return found

    def number(text: str) -> object:
        raise refuse(f"{shown(text, 40)} where only whole numbers can be")

    def integer(text: str) -> int:
        if len(text) > 20 or text == "-0":
            number(text)
        return int(text)

    values = sum(map(raw.count, (b"{", b"[", b",")))
    if values > MAX_VALUES:
        raise refuse(f"about {values:,} JSON values, more than {MAX_VALUES:,}")
    hooks: dict[str, Callable[[str], object]] = (
        {} if floats else {"parse_int": integer, "parse_float": number, "parse_constant": number}
    )
    try:
        text = raw.decode()
        value: object = json.loads(text, object_pairs_hook=unique, **hooks)  # type: ignore[arg-type]
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise refuse("JSON nested too deeply") from None
    except UnicodeDecodeError as error:
        raise refuse(f"not UTF-8 at byte {error.start}") from None
    except UnicodeEncodeError:
        raise refuse("a \\u escape that is half a character (a lone surrogate)") from None
    except json.JSONDecodeError as error:
        raise refuse(f"not JSON: {error.msg} at character {error.pos}") from None
    except ValueError:
        raise refuse("a number with thousands of digits") from None
    return value
