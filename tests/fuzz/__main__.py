"""`python -m tests.fuzz NAME SECONDS`: fuzz a property with atheris, which `make fuzz` installs.

What was found worth keeping stays in `build/fuzz/NAME`, and is where the next run starts.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=["mlflow_hokusai_auth.core", "mlflow_hokusai_auth.core.prefixes"]
):
    from .properties import PROPERTIES

from .corpus import WORDS, seeds


def main(name: str, seconds: str) -> None:
    folder = Path("build/fuzz", name)
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds(name)):
        (folder / f"seed-{number}").write_bytes(data)
    escaped = ("".join(f"\\x{byte:02x}" for byte in word) for word in WORDS)
    words = folder.with_suffix(".words")
    words.write_text("".join(f'"{word}"\n' for word in escaped))
    options = [f"-max_total_time={seconds}", f"-dict={words}", f"-artifact_prefix={folder}."]
    # Enough for what a header holds; the rest is only longer.
    options += ["-max_len=1024", "-timeout=10", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], str(folder), *options], PROPERTIES[name])
    atheris.Fuzz()


main(*sys.argv[1:])
