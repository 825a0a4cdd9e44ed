"""Users' mistakes: mypy and pyright report each marked line and no other line. Never run."""

import numpy as np
import torch

import lars_tree as lt
from lars_tree import io, report
from lars_tree.torch import Lars, param_groups

w = {"kernel": np.ones((3, 2)), "bias": np.zeros(2)}
tree = lt.Container(w)
array = lt.Array(np.ones(3))
model = torch.nn.Linear(3, 2)
texts = {"kernel": "fast", "bias": "slow"}

# Options of a step.
lt.lars_update(w, w)  # error
lt.lars_update(w, w, "fast")  # error
lt.lars_update(w, w, None)  # error
lt.lars_update(w, w, 1j)  # error
lt.lars_update(w, w, texts)  # error
lt.lars_update(w, w, lt.schedules.Constant(0.1))  # error
lt.lars_update(w, w, 0.1, nonfinite="rais")  # error
lt.lars_update(w, w, 0.1, nonfinite={"kernel": "skip", "bias": "rais"})  # error
lt.lars_update(w, w, 0.1, decay_lambda="1e-4")  # error
lt.lars_update(w, w, 0.1, weight_decay=1e-4)  # error
lt.lars_update(w, w, 0.1, adapt="decayed")  # error
lt.lars_update(w, w, 0.1, trust_clip=1)  # error
lt.lars_update(w, w, 0.1, trust_clip=lambda path: True)  # error
lt.lars_update(w, w, 0.1, trust_clip=lambda path, x: "yes")  # error
lt.lars_update(w, w, 0.1, layer_axis="rows")  # error
lt.lars_update(w=w, dcdw=w, lr=0.1)  # error
tree.lars_update(w, "fast")  # error
tree.lars_update(w, 0.1, nonfinite="rais")  # error
tree.lars_update(w, 0.1, weight_decay=1e-4)  # error
array.lars_update(w, "fast")  # error
array.lars_update(w, 0.1, joint_norm="yes")  # error
report.trust_ratios(w, w, "fast")  # error
report.layer_table(w, w, 0.1, eps="small")  # error

# Types of results.
_ = lt.lars_update(w, w, 0.1).kernel  # error
text: str = tree * 2  # error
text = 2 - array  # error
text = tree.map(np.negative)  # error
text = tree.lars_update(w, 0.1)  # error
text = array.lars_update(1.0, 0.1)  # error
text = lt.schedules.Cosine(0.1, 100)(3)  # error

# Optimizers.
lt.Lars("fast")  # error
lt.Lars(0.1, momentum="high")  # error
lt.Lars(0.1, nesterov="yes")  # error
lt.Lars(0.1, nonfinite="rais")  # error
lt.Lars(0.1, decay_lambda=1e-4)  # error
lt.schedules.Polynomial("high", total_steps=100)  # error
opt = lt.Lars(0.1)
opt.update(w, w)  # error
opt.update(w, w, "state")  # error
opt.update(w, w, opt.init(w), grad_scale="large")  # error
opt.update(w, w, opt.init(w), decay_lambda=0.1)  # error
_ = opt.update(w, w, opt.init(w))[0].kernel  # error
_ = opt.update(w, w, opt.init(w))[1].velocity.kernel
Lars(model, lr=0.1)  # error
Lars(model.parameters(), lr="fast")  # error
Lars(model.parameters(), momentum="high")  # error
Lars(model.parameters(), nonfinite="rais")  # error
Lars(model.parameters(), adapt="decay")  # error
Lars(model.parameters(), weight_decy=1e-4)  # error
Lars(model.parameters()).step(0.1)  # error
param_groups(model, weight_decay="1e-4")  # error
param_groups(model, momentum=lambda name, p: "high")  # error
param_groups(model, excluded_lr="1e-4")  # error
param_groups(model.parameters())  # error

# Files and reports.
io.save([np.ones(2)], "w.npz")  # error
io.load("w.npz", library="tensorflow")  # error
io.open("w.safetensors", "w")  # error
report.ScalarCallback(print)  # error
report.TrustHistory(capacity="all")  # error
