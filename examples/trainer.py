"""INQ in an ordinary Lightning script: train, then train on with the callback."""

from pytorch_lightning import Trainer, seed_everything

from inq_lightning import INQCallback
from inq_lightning.recipes.classifier import Classifier
from inq_lightning.recipes.data import DigitsDataModule
from inq_lightning.recipes.models import SmallCNN

seed_everything(0)
digits, model = DigitsDataModule(), Classifier(SmallCNN(), num_classes=10, lr_epochs=4)
Trainer(max_epochs=4).fit(model, digits)  # your trained network

callback = INQCallback(bits=5)
trainer = Trainer(max_epochs=16, callbacks=[callback])
trainer.fit(model, digits)
trainer.test(model, digits)
print(f"{callback.quantized_fraction:.0%} of the weights are powers of two or zero")
