"""How a launcher of this package launches: by Triton at first, then by a tape of what it did (`remember`).

On a GPU the Python of a launch takes longer than many a kernel. But a launcher is a function of the shapes, strides,
types and alignments of its tensors and of its numbers: what it works out of them is the same for equal ones. Written
in the terms of this room (`empty`, `held`, `launch`), its second such call is put on a tape, and later ones replay
that: the same allocations, the same kernels, the same arguments.
"""

from asymvlm_kernels.launch.key import Remembered, outline
from asymvlm_kernels.launch.record import empty, forget, held, launch, remember

__all__ = ["Remembered", "empty", "forget", "held", "launch", "outline", "remember"]
