"""Proof on the user's own model, hardware, dtype and attention that a patched run is the masked run of the same tokens.

Nothing here uses how the patch works: the references run the unpatched model with closed attention columns.
"""

from asymvlm.verification.report import CheckRow, Verification
from asymvlm.verification.verify import verify

__all__ = ["CheckRow", "Verification", "verify"]
