"""INQ in the Trainer of Hugging Face's transformers: a callback, here on a small BERT made on the spot."""

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from inq_lightning import INQTrainerCallback

torch.manual_seed(0)
tokens = torch.randint(16, (256, 8))
samples = [{"input_ids": row, "labels": row[0] // 8} for row in tokens]
shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
model = BertForSequenceClassification(BertConfig(vocab_size=16, num_labels=2, **shape))

callback = INQTrainerCallback(bits=5)
arguments = TrainingArguments("run", num_train_epochs=8, learning_rate=1e-3, per_device_train_batch_size=32)
trainer = Trainer(model, arguments, train_dataset=samples, callbacks=[callback])
trainer.train()  # resume_from_checkpoint=True goes on with an interrupted run, bit for bit

print(f"{callback.inq.quantized_fraction:.1%} of {len(callback.inq.layers)} matrices quantized")
