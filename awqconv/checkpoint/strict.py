"""JSON as hostile input: one value or one AwqconvError, in bounded time and memory."""

import json
import re
from collections import Counter
from collections.abc import Callable
from typing import NoReturn

from awqconv.errors import AwqconvError

MAX_VALUES = 4_000_000  # 400,000 tensors; the largest real checkpoints have 150,000


def shown(text: str, limit: int = 120) -> str:
    """A name from a file as a message may print it: one short line without control characters."""
    short = text if len(text) <= limit else f"{text[: limit - 20]}...{text[-17:]}"
    return short if short.isprintable() else ascii(short)


def parse_json(raw: bytes, where: str, fix: str, *, floats: bool = True) -> object:
    """The value of a UTF-8 JSON text. Repeated keys and lone surrogates are refused everywhere.

    `floats=False` also refuses every number but a plain integer, so what is accepted means the
    same to any JSON parser. With floats, NaN and Infinity pass: Python's
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

    def number(text: str) -> NoReturn:
        raise refuse(f"{shown(text, 40)} where only whole numbers can be")

    def integer(text: str) -> int:
        return number(text) if text == "-0" else int(text)

    values = sum(map(raw.count, (b"{", b"[", b",")))
    if values > MAX_VALUES:
        raise refuse(f"about {values:,} JSON values, more than {MAX_VALUES:,}")
    hooks: dict[str, Callable[[str], object]] = {}
    if not floats:
        hooks = {"parse_float": number, "parse_constant": number}
        if b"-0" in raw:  # an integer to Python, a float to others; the hook costs time
            hooks["parse_int"] = integer
    try:
        text = raw.decode()
        value: object = json.loads(text, object_pairs_hook=unique, **hooks)  # type: ignore[arg-type]
        if re.search(r"\\u[dD][89a-fA-F]", text):
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
