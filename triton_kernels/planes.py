"""The tensors that a compressed value is stored as. Imports no torch."""

from dataclasses import dataclass

GROUP = 8
"""Values whose codes share W whole bytes; every block is a whole number of groups."""


@dataclass(frozen=True, slots=True)
class Plane:
    """One stored tensor of a compressed value: one-dimensional, ``length`` elements of torch dtype ``dtype``."""

    name: str
    dtype: str
    length: int
    itemsize: int

    @property
    def n_bytes(self) -> int:
        """Bytes of the plane."""
        return self.length * self.itemsize


_CODE32 = Plane("code32", "int32", 1, 4)
_CODE16 = Plane("code16", "int16", 1, 2)
_CODE8 = Plane("code8", "uint8", 1, 1)

GROUP_PLANES: dict[int, tuple[Plane, ...]] = {
    2: (_CODE16,),
    3: (_CODE16, _CODE8),
    4: (_CODE32,),
    5: (_CODE32, _CODE8),
    6: (_CODE32, _CODE16),
    7: (_CODE32, _CODE16, _CODE8),
    8: (Plane("code32", "int32", 2, 4),),
}
"""The planes of codes by width, with the length that one group of 8 values takes of each."""
