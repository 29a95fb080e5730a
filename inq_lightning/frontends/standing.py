"""What users ask of every front end: how far the quantization is."""

from __future__ import annotations

from torch import Tensor

from inq_lightning.core.coverage import Coverage
from inq_lightning.core.layer import Layer
from inq_lightning.core.quantizer import Quantizer


class Standing:
    """Answers for the engine.

    Attributes:
        quantizer: The engine that does the work.
    """

    quantizer: Quantizer

    @property
    def quantized_fraction(self) -> float:
        """Share of the selected weights that are frozen, all layers together: 0 to 1."""
        return self.quantizer.quantized_fraction

    @property
    def phase(self) -> int:
        """How many portions have begun: 0 before the first one."""
        return self.quantizer.phase

    @property
    def layers(self) -> list[Layer]:
        """One record for each selected parameter, in the module's order; empty before quantization begins."""
        return self.quantizer.layers

    @property
    def coverage(self) -> Coverage:
        """How much of the module is quantized, and what is left out and why; nothing before quantization begins."""
        return self.quantizer.coverage

    def frozen_mask(self, name: str) -> Tensor:
        """Which weights of a parameter are frozen.

        Args:
            name: The parameter's name, as :attr:`layers` lists it.

        Returns:
            bool tensor in the parameter's shape, True where frozen. For a sharded parameter it is a collective call.

        Raises:
            KeyError: No selected parameter has this name.
        """
        return self.quantizer.frozen_mask(name)
