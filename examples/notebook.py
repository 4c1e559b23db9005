# Cells of a notebook ("%matplotlib inline" first, to see the figures); as a script it runs too.
import numpy as np

import promoe
from promoe import report

config = promoe.preset("ProMoE-digits")  # 6 routed experts, one shared, one unconditional
run = promoe.train(config, "digits", out="runs/notebook", steps=1500, lr=1e-3, warmup=50, ema=0.995)
report.loss_curve(run.history)

labels = np.repeat(np.arange(10), 8)
x = promoe.sample(run.model, labels, steps=30, cfg=1.5)  # (80, 1, 8, 8)
report.sample_grid(x, columns=8, labels=labels)

layers = run.model.routing(x[::8], t=100.0, y=labels[::8])  # which expert took which token
report.routing_map(np.stack([layer.expert[:, :, 0] for layer in layers]), x[::8])

model = promoe.Model(config.replace(top_k=2, router_gate="softmax"))  # another router, by hand
x0, y = promoe.load_digits()
for step in range(10):
    model.accumulate(x0[:64], y[:64], position=64 * step)
    print(model.update(lr=1e-3, ema=0.995))
