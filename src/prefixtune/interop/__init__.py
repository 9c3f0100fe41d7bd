"""Other projects' files, in and out: PEFT's prefix adapters, and the checkpoints of the method's authors.

Knows nothing of how a prefix is trained and used.
"""

from prefixtune.interop.authors import import_authors, is_authors
from prefixtune.interop.peft import PEFT_TYPES, export_peft, import_peft

__all__ = ["PEFT_TYPES", "export_peft", "import_authors", "import_peft", "is_authors"]
