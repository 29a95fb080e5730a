"""The same algorithm in a plain PyTorch loop: the core needs no Lightning."""

import torch
from torch import nn

from inq_lightning import FrozenWeight, Schedule, select_parameters

torch.manual_seed(0)
x = torch.randn(512, 16)
y = (x[:, :4] * x[:, 4:8]).argmax(1)
model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)

layers = [FrozenWeight(s.name, s.parameter, s.bits) for s in select_parameters(model, bits=5)]
schedule = Schedule.every(50, [0.5, 0.75, 0.875, 1.0])  # after 100 epochs of ordinary training

for epoch in range(300):
    if epoch >= 100:
        for layer in layers:
            layer.freeze(schedule.portion_at(epoch - 100))
    loss = nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    for layer in layers:
        layer.mask_gradient()
    optimizer.step()
    for layer in layers:
        layer.restore()
    if epoch % 50 == 49:
        frozen = sum(layer.frozen for layer in layers) / sum(layer.numel for layer in layers)
        print(f"epoch {epoch + 1}: loss {loss:.4f}, {frozen:.1%} quantized")

for layer in layers:
    print(layer.name, layer.parameter.detach().abs().unique().tolist())
