"""INQ in a loop on Lightning Fabric, which goes on where it was interrupted; `fabric run --devices 2` works, too."""

from pathlib import Path

import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers import CSVLogger
from torch import nn

from inq_lightning import FabricINQ

fabric = Fabric(accelerator="auto", devices=1, loggers=CSVLogger("logs"))
fabric.launch()
fabric.seed_everything(0)
x = torch.randn(512, 16)
y = (x[:, :4] + x[:, 4:8]).argmax(1)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=64, shuffle=True)
model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)  # of one phase, since each begins it anew

model, optimizer = fabric.setup(model, optimizer)
loader = fabric.setup_dataloaders(loader)
inq = FabricINQ(fabric, model, optimizer, bits=5, epochs=20, schedulers=[scheduler])
state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "inq": inq, "epoch": 0}
if Path("last.ckpt").exists():
    fabric.load("last.ckpt", state)

for epoch in range(state["epoch"], 20):
    inq.advance(epoch)
    for inputs, targets in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        fabric.backward(loss)
        optimizer.step()
    scheduler.step()
    fabric.print(f"epoch {epoch + 1}: loss {loss:.4f}, {inq.quantized_fraction:.1%} quantized")
    fabric.save("last.ckpt", {**state, "epoch": epoch + 1})

inq.finish()
