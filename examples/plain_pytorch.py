"""The same algorithm in a plain PyTorch loop: no Lightning, one call an epoch."""

import torch
from torch import nn

from inq_lightning import INQ

torch.manual_seed(0)
x = torch.randn(512, 16)
y = (x[:, :4] * x[:, 4:8]).argmax(1)
model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
inq = INQ(model, optimizer, bits=5, epochs=300)

for epoch in range(300):
    if epoch >= 100:  # after 100 epochs of ordinary training
        inq.advance(epoch)
    loss = nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if epoch % 50 == 49:
        print(f"epoch {epoch + 1}: loss {loss:.4f}, {inq.quantized_fraction:.1%} quantized")

inq.finish()
for layer in inq.layers:
    print(layer.name, model.get_parameter(layer.name).detach().abs().unique().tolist())
