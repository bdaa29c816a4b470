# SPDX-License-Identifier: Apache-2.0
"""What a vLLM has of what this package uses, as a dictionary that fits a file:

    python -m tests.contract.record WHEEL_OR_FOLDER tests/data/vllm-VERSION.json

where WHEEL is what ``pip download --no-deps vllm==VERSION`` brings. It need not be installed. Run it again when the
package uses something else of vLLM: ``tests/contract/test_contract.py`` says so.
"""

import json
import sys
from pathlib import Path
from typing import Any

from tests.contract.uses import Uses, uses
from tests.contract.vllm_source import Source, signature


def record(source: Source, used: Uses) -> dict[str, Any]:
    """Signatures by ``module:name`` and ``module:class.member``, null where there is none, and abstract methods."""
    symbols, members = {}, {}
    for symbol in used.symbols:
        found = source.find(*symbol.split(":"))
        symbols[symbol] = signature(found[1]) if found else None
    wanted = {(base, name) for bases, names in used.overrides.values() for base in bases for name in names}
    for owner, name in used.members | wanted:
        node = source.member(*owner.split(":"), name)
        members[f"{owner}.{name}"] = signature(node) if node is not None else None
    bases = {base for bases, _ in used.overrides.values() for base in bases}
    return {
        "symbols": dict(sorted(symbols.items())),
        "members": dict(sorted(members.items())),
        "abstract": {base: source.abstract(*base.split(":")) for base in sorted(bases)},
    }


if __name__ == "__main__":
    made = record(Source(Path(sys.argv[1])), uses())
    Path(sys.argv[2]).write_text(json.dumps(made, indent=1) + "\n")
