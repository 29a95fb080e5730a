"""Networks."""

from torch import Tensor, nn


class MLP(nn.Module):
    """Two linear layers."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(in_features, hidden_features), nn.ReLU(), nn.Linear(hidden_features, out_features)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        return self.layers(x)
