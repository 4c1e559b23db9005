"""The whole model in float64 NumPy: the oracles of tests/oracle, joined by a tape.

The tape adds up gradients by itself, so nothing here knows the order in which the C core goes
backwards, where it fuses a residual, or where it shares a buffer. The network is written as the papers
have it: x + gate * branch, then LayerNorm.
"""

import importlib

import numpy as np


class Value:
    """An array with a gradient."""

    def __init__(self, value):
        self.value, self.grad = value, 0.0


class Tape:
    def __init__(self):
        self.steps = []  # run in reverse

    def op(self, op, out, inputs, **attributes):
        """`out` of the oracle of an op, a Value; inputs are Values or constants."""
        oracle = importlib.import_module(f"tests.oracle.{op}")
        values = {k: v.value if isinstance(v, Value) else v for k, v in inputs.items()}
        result = Value(oracle.forward(**values, **attributes)[out])

        def back():
            grads = oracle.backward(**values, **attributes, **{"d" + out: result.grad})
            for name, v in inputs.items():
                if isinstance(v, Value):
                    v.grad = v.grad + grads["d" + name]

        self.steps.append(back)
        return result

    def map(self, function, adjoint, *inputs):
        """A linear map of Values that is not an op; adjoint(grad) gives one gradient for each input."""
        result = Value(function(*(v.value for v in inputs)))

        def back():
            for v, g in zip(inputs, adjoint(result.grad)):
                v.grad = v.grad + g

        self.steps.append(back)
        return result

    def columns(self, x, i, width):
        """Columns i*width .. (i+1)*width."""
        def adjoint(g):
            full = np.zeros_like(x.value)
            full[:, i * width:(i + 1) * width] = g
            return [full]

        return self.map(lambda v: v[:, i * width:(i + 1) * width].copy(), adjoint, x)

    def join(self, values):
        """Raveled and concatenated."""
        ends = np.cumsum([v.value.size for v in values])[:-1]
        return self.map(lambda *a: np.concatenate([x.ravel() for x in a]),
                        lambda g: [p.reshape(v.value.shape) for p, v in zip(np.split(g, ends), values)],
                        *values)

    def reshape(self, x, shape):
        return self.map(lambda v: v.reshape(shape), lambda g: [g.reshape(x.value.shape)], x)

    def add(self, a, b):
        return self.map(lambda x, y: x + y, lambda g: [g, g], a, b)

    def scaled(self, x, gate, T):
        """x (N, D) times one row of gate per image."""
        rows = np.repeat(gate.value, T, axis=0)
        return self.map(lambda a, _: a * rows,
                        lambda g: [g * rows, (g * x.value).reshape(-1, T, g.shape[1]).sum(1)], x, gate)

    def backward(self, losses):
        for loss in losses:
            loss.grad = np.ones(1)
        for back in reversed(self.steps):
            back()


class Model:
    """config, {official name: array}; run gives out, mse, aux, choices, and grads after backward."""

    def __init__(self, config, state):
        self.c = config
        self.p = {k: Value(np.asarray(v, np.float64)) for k, v in state.items()}

    def run(self, x, t, y, target=None):
        self.tape, self.choices, self.aux, c = Tape(), [], [], self.c
        tape, D, B = self.tape, c.hidden_size, len(x)
        self.B, self.y = B, np.asarray(y)
        grid = self.grid()
        h = tape.op("patch_embed", "y", {
            "x": np.asarray(x, np.float64).reshape(B, c.in_channels, -1),
            "weight": tape.reshape(self.p["x_embedder.proj.weight"], (D, -1)),
            "bias": self.p["x_embedder.proj.bias"], "pos": self.p["pos_embed"].value[0]}, **grid)

        angles = importlib.import_module("tests.oracle.timestep_embedding") \
            .forward(np.asarray(t, np.float64), 256)["e"]
        time = self.linear(angles, "t_embedder.mlp.0", activation="silu")
        time = self.linear(time, "t_embedder.mlp.2")
        label = tape.op("label_embedding", "c", {"table": self.p["y_embedder.embedding_table.weight"],
                                                 "add": time}, y=self.y)
        silu = tape.op("silu", "y", {"x": label})

        for i in range(c.depth):
            h = self.block(h, silu, i)
        mod = self.linear(silu, "final_layer.adaLN_modulation.1")
        h = self.norm(h, tape.columns(mod, 0, D), tape.columns(mod, 1, D))
        h = self.linear(h, "final_layer.linear")
        volume = int(np.prod(c.sizes))
        out = tape.op("unpatchify", "y", {"x": h}, B=B, C=c.out_channels, V=volume, **grid)
        self.out = out.value.reshape(B, c.out_channels, *c.sizes)
        if target is not None:
            mse = tape.op("mse_loss", "loss", {"pred": out}, target=np.asarray(
                target, np.float64).reshape(B, c.in_channels, -1))
            self.mse = float(mse.value[0])
            self.aux_loss = float(sum(a.value[0] for a in self.aux))
            tape.backward([mse, *self.aux])
        return self.out

    @property
    def grads(self):
        return {k: np.broadcast_to(v.grad, v.value.shape) for k, v in self.p.items() if k != "pos_embed"}

    def grid(self):
        s, p = ((1,) * (3 - len(v)) + tuple(v) for v in (self.c.sizes, self.c.patches))
        return {**{f"s{i}": s[i] for i in range(3)}, **{f"p{i}": p[i] for i in range(3)}}

    def linear(self, x, name, **attributes):
        inputs = {"x": x, "weight": self.p[f"{name}.weight"], "bias": self.p[f"{name}.bias"]}
        if not isinstance(x, Value):
            inputs["x"] = Value(x)
        return self.tape.op("linear", "y", inputs, **attributes)

    def norm(self, x, shift, scale):
        return self.tape.op("residual_layernorm_modulate", "y", {"x": x, "shift": shift, "scale": scale},
                            B=self.B)

    def block(self, h, silu, i):
        c, tape, D, T = self.c, self.tape, self.c.hidden_size, self.c.tokens
        mod = self.linear(silu, f"blocks.{i}.adaLN_modulation.1")
        shift1, scale1, gate1, shift2, scale2, gate2 = (tape.columns(mod, j, D) for j in range(6))
        qkv = self.linear(self.norm(h, shift1, scale1), f"blocks.{i}.attn.qkv")
        inputs = {"qkv": qkv}
        if c.qk_norm:
            inputs |= {f"{a}_{b}": self.p[f"blocks.{i}.attn.{a}_norm.{b}"]
                       for a in "qk" for b in ("weight", "bias")}
        heads = tape.op("attention", "y", inputs, B=self.B, H=c.num_heads)
        h = tape.add(h, tape.scaled(self.linear(heads, f"blocks.{i}.attn.proj"), gate1, T))
        x = self.norm(h, shift2, scale2)
        return tape.add(h, tape.scaled(self.ffn(x, f"blocks.{i}.mlp.", i), gate2, T))

    def ffn(self, x, prefix, i):
        c = self.c
        if i not in c.expert_blocks:
            return self.experts(x, [(prefix + "fc1", prefix + "fc2")], {}, Z=c.mlp_hidden_size)
        names = [f"{prefix}experts.{j}." for j in range(c.plan_groups)]
        names += [f"{prefix}shared_expert."] * c.use_shared_expert
        plan = self.route(x, self.p[prefix + "cluster_centers"])
        return self.experts(x, [(n + "up_proj", n + "down_proj") for n in names], plan, W=c.expert_width,
                            Z=c.shared_expert_width)

    def experts(self, x, layers, plan, **attributes):
        tape, p, D = self.tape, self.p, self.c.hidden_size
        widths = [len(p[f"{up}.bias"].value) for up, _ in layers]
        foff = np.cumsum([0, *widths])
        inputs = {"x": x, "up": tape.reshape(tape.join([p[f"{up}.weight"] for up, _ in layers]), (-1, D)),
                  "up_bias": tape.join([p[f"{up}.bias"] for up, _ in layers]),
                  "down": tape.join([p[f"{down}.weight"] for _, down in layers]),
                  "down_bias": tape.reshape(tape.join([p[f"{down}.bias"] for _, down in layers]), (-1, D))}
        return tape.op("experts", "y", inputs | plan, foff=foff, **attributes)

    def route(self, x, proto):
        c, tape = self.c, self.tape
        group = c.num_routed_experts if c.use_uncond_expert else -1
        part = np.repeat(np.where(self.y == c.num_classes, group, -1), c.tokens)
        z = tape.op("prototypical_routing", "z", {"x": x, "proto": proto}, part=part)
        s = tape.op("router_gate", "s", {"z": z}, part=part, gate=c.router_gate)
        choice = importlib.import_module("tests.oracle.token_choice") \
            .forward(s.value, c.top_k, part)["choice"]
        self.choices.append(choice.reshape(self.B, c.tokens, c.top_k))
        weight = tape.op("token_choice", "weight", {"s": s}, A=c.top_k, part=part)
        if c.contrastive_weight:
            self.aux.append(tape.op(
                "routing_contrastive_loss", "loss", {"x": x, "proto": proto}, choice=choice,
                assign=c.contrastive_assign, temperature=c.contrastive_temperature,
                weight=c.contrastive_weight))
        if c.load_balance_weight:
            p = s if c.router_gate == "softmax" else \
                tape.op("router_gate", "s", {"z": s}, part=part, gate="softmax")
            self.aux.append(tape.op("load_balance_loss", "loss", {"p": p}, choice=choice, B=self.B,
                                    part=part, per=c.load_balance_per, weight=c.load_balance_weight))
        plan = importlib.import_module("tests.oracle.routing_plan") \
            .forward(choice, weight.value, c.plan_groups)
        row_weight = tape.op("routing_plan", "row_weight", {"weight": weight}, choice=choice,
                             G=c.plan_groups)
        return {"row_weight": row_weight,
                **{k: plan[k] for k in ("row_off", "row_token", "tok_off", "tok_row")}}
