"""What the published models of the frequency and phase family compute, written plainly from their maths: an oracle for tests.

`hidden(family, params, ids)` takes the published parameter names and left-padded ids (B,L) and returns hidden states (B,L,D);
`loss` is the published training loss, `random_params` makes parameters of any size from a seed, `shapes` says what they are.
One convolution a channel, (L,L) masks of -10000, atan2, explicit loops: slow on purpose. `drop` is applied where the models
drop out, so that the same lines can be timed as a training step. Nothing here imports the library.
"""
import math
import torch, torch.nn.functional as F

FAMILIES = ('sasrec', 'fmlprec', 'bsarec', 'gru4rec', 'wearec', 'pswrecv13', 'pswrecv13_norot', 'pswrecv13_vam',
            'pswrecv13_softmag', 'pswrecv1111_residual_dynamic', 'vmamba')
DILATIONS = (1, 2, 4, 8)
PENALTY = .05                        # weight of the phase steps in the loss of the models that have it


def keep(x): return x

def under(p, name): return {k[len(name) + 1:]: v for k, v in p.items() if k.startswith(name + '.')}

def layers(p, name):
    "The parameters of each layer under `name`, in order"
    return [under(p, f'{name}.{i}') for i in range(1 + max(int(k[len(name) + 1:].split('.')[0]) for k in p if k.startswith(name + '.')))]

def linear(x, p, name): return F.linear(x, p[name + '.weight'], p.get(name + '.bias'))

def norm(x, p, name): return F.layer_norm(x, x.shape[-1:], p[name + '.weight'], p[name + '.bias'], 1e-12)

def looked_up(ids, p):
    "The padding row is a vector like any other, except that the look-up gives it no gradient"
    return F.embedding(ids, p['item_embeddings.weight'], padding_idx=0)

def embedded(ids, p, drop):
    e = looked_up(ids, p) + p['position_embeddings.weight'][:ids.shape[1]]
    return drop(norm(e, p, 'LayerNorm'))

def feed_forward(x, p, ln, drop):
    return norm(drop(linear(F.gelu(linear(x, p, 'dense_1')), p, 'dense_2')) + x, p, ln)

def mask(ids):
    "(B,1,L,L): -10000 wherever the key is padding or later than the query"
    L = ids.shape[1]
    seen = (ids > 0)[:, None, None, :] & torch.ones(L, L, dtype=torch.bool).tril()
    return (~seen) * -10000.

def split(x, H):
    B, L, D = x.shape
    return x.view(B, L, H, D // H).transpose(1, 2)

def merge(x):
    B, H, L, d = x.shape
    return x.transpose(1, 2).reshape(B, L, H * d)

def attend(q, k, v, drop, *added):
    "Terms are added in this order: in float32, -10000 rounds the scores of a padding query to a thousandth"
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    for term in added: scores = scores + term
    return merge(drop(torch.softmax(scores, -1)) @ v)

def attention(x, p, H, M, drop):
    q, k, v = (split(linear(x, p, n), H) for n in ('query', 'key', 'value'))
    return norm(drop(linear(attend(q, k, v, drop, M), p, 'dense')) + x, p, 'LayerNorm')


# frequency models

def fourier(x, p, drop):
    X = torch.fft.rfft(x, dim=1, norm='ortho') * torch.view_as_complex(p['complex_weight'])
    return norm(drop(torch.fft.irfft(X, n=x.shape[1], dim=1, norm='ortho')) + x, p, 'LayerNorm')

def rescale(x, p, c, drop):
    X = torch.fft.rfft(x, dim=1, norm='ortho')
    kept = torch.arange(X.shape[1]) < c // 2 + 1
    low = torch.fft.irfft(X * kept[:, None], n=x.shape[1], dim=1, norm='ortho')
    return norm(drop(low + p['sqrt_beta'] ** 2 * (x - low)) + x, p, 'LayerNorm')

def dynamic(x, p):
    "x (B,H,L,d): every head's spectrum scaled and shifted by what the mean of the window asks for"
    B, H, L, d = x.shape
    context = merge(x).mean(1)
    a = linear(F.gelu(linear(context, p, 'adaptive_mlp.0')), p, 'adaptive_mlp.2').view(B, H, L // 2 + 1, 2)
    S = torch.fft.rfft(x, dim=2, norm='ortho')
    S = S * (p['base_filter'] * (1 + a[..., :1])) + (p['base_bias'] + a[..., 1:])
    return torch.fft.irfft(S, n=L, dim=2, norm='ortho')

def haar(x, p):
    "x (B,H,L,d): pair means, and pair differences weighted; an odd last step becomes 0"
    out, n = torch.zeros_like(x), x.shape[2] // 2
    a, b = x[:, :, 0:2 * n:2], x[:, :, 1:2 * n:2]
    detail = (a - b) / 2 * p['complex_weight']
    out[:, :, 0:2 * n:2], out[:, :, 1:2 * n:2] = (a + b) / 2 + detail, (a + b) / 2 - detail
    return out

def wavelet(x, p, alpha, drop):
    xh = split(x, p['base_filter'].shape[0])
    return norm(drop(merge((1 - alpha) * haar(xh, p) + alpha * dynamic(xh, p))) + x, p, 'LayerNorm')

def sasrec(p, ids, n_heads=2, drop=keep):
    x, M = embedded(ids, p, drop), mask(ids)
    for q in layers(p, 'item_encoder.blocks'):
        x = attention(x, under(q, 'layer'), n_heads, M, drop)
        x = feed_forward(x, under(q, 'feed_forward'), 'LayerNorm', drop)
    return x, 0.

def fmlprec(p, ids, drop=keep):
    x = embedded(ids, p, drop)
    for q in layers(p, 'item_encoder.blocks'):
        x = feed_forward(fourier(x, under(q, 'layer'), drop), under(q, 'feed_forward'), 'LayerNorm', drop)
    return x, 0.

def bsarec(p, ids, n_heads=2, alpha=.9, c=3, drop=keep):
    x, M = embedded(ids, p, drop), mask(ids)
    for q in layers(p, 'item_encoder.blocks'):
        y = rescale(x, under(q, 'layer.filter_layer'), c, drop)
        z = attention(x, under(q, 'layer.attention_layer'), n_heads, M, drop)
        x = feed_forward(alpha * y + (1 - alpha) * z, under(q, 'feed_forward'), 'LayerNorm', drop)
    return x, 0.

def wearec(p, ids, alpha=.3, drop=keep):
    x = embedded(ids, p, drop)
    for q in layers(p, 'item_encoder.blocks'):
        x = feed_forward(wavelet(x, under(q, 'layer'), alpha, drop), under(q, 'feed_forward'), 'LayerNorm', drop)
    return x, 0.

def gru4rec(p, ids, drop=keep):
    x, n = drop(looked_up(ids, p)), 0
    while f'gru_layers.weight_ih_l{n}' in p:
        W, U = p[f'gru_layers.weight_ih_l{n}'], p[f'gru_layers.weight_hh_l{n}']
        h, states = x.new_zeros(len(x), U.shape[1]), []
        for t in range(x.shape[1]):
            (wr, wz, wn), (ur, uz, un) = (x[:, t] @ W.T).chunk(3, -1), (h @ U.T).chunk(3, -1)
            r, z = torch.sigmoid(wr + ur), torch.sigmoid(wz + uz)
            h = (1 - z) * torch.tanh(wn + r * un) + z * h
            states.append(h)
        x, n = torch.stack(states, 1), n + 1
    return linear(x, p, 'dense'), 0.


# phase models

def bank(x, p, dilations=DILATIONS):
    "(u, v) (B,L,S): per band and channel a causal dilated convolution, then the mean over channels"
    def responses(name):
        out = []
        for w, dilation in zip((p[f'{name}.{s}.weight'] for s in range(len(dilations)) if f'{name}.{s}.weight' in p), dilations):
            padded = F.pad(x.transpose(1, 2), ((w.shape[-1] - 1) * dilation, 0))
            out.append(F.conv1d(padded, w, dilation=dilation, groups=x.shape[-1]).mean(1))
        return torch.stack(out, -1)
    return responses('real_convs'), responses('imag_convs')

def phases(x, p):
    "Phase angles and magnitudes (B,L,S)"
    u, v = bank(x, p)
    return torch.atan2(v, u + 1e-8), torch.sqrt(u ** 2 + v ** 2 + 1e-8)

def gated(cos, sin, m, tau, temperature):
    "Phases of weak magnitudes fade: the threshold is relative to the mean magnitude of the whole window"
    threshold = tau * m.mean((1, 2), keepdim=True)
    g = torch.sigmoid((m - threshold) / (temperature * threshold + 1e-8))
    return g * cos, g * sin

def phase_steps(cos, sin):
    "How far phases turn in a step, (dcos)^2 + (dsin)^2 on average"
    if cos.shape[1] < 2: return 0.
    return ((cos[:, 1:] - cos[:, :-1]) ** 2 + (sin[:, 1:] - sin[:, :-1]) ** 2).mean()

def rotated(z, angle):
    "z (B,H,L,d): all pairs (i, i + d/2) turn by one angle a step, angle (B,H,L)"
    a, b = z.chunk(2, -1)
    cos, sin = angle.cos()[..., None], angle.sin()[..., None]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

def per_head(weights, x):
    "weights (H,S) or (B,H,S), x (B,L,S) -> sum over bands (B,H,L)"
    return (weights.unsqueeze(-2) * x[:, None]).sum(-1)

def alignment(cos, sin, logits):
    "(B,H,L,L): how well the phases of two steps agree, bands weighted by softmax(logits)"
    w = (torch.softmax(logits, -1) + 1e-8).unsqueeze(-2)
    c, s = cos[:, None], sin[:, None]
    return ((w * c) @ c.transpose(-1, -2) + (w * s) @ s.transpose(-1, -2)) / math.sqrt(cos.shape[-1])

def qkv(x, p, H): return (split(linear(x, p, n), H) for n in ('query', 'key', 'value'))

def closed(out, x, p, drop): return norm(drop(linear(out, p, 'out_proj')) + x, p, 'layer_norm')

def turned_attention(x, p, phi, m, M, drop):
    g = p['gamma']                                       # (1,H,1,1): a head is a band
    q, k, v = qkv(x, p, g.shape[1])
    phi, scale = phi.transpose(1, 2), 1 + g * m.transpose(1, 2)[..., None]
    return closed(attend(rotated(q * scale, phi), rotated(k * scale, phi), v, drop, M), x, p, drop)

def phase_attention(x, p, cos, sin, m, M, scaled_values, drop):
    q, k, v = qkv(x, p, p['gamma'].shape[0])
    relative = m / (m.mean(-1, keepdim=True) + 1e-8)
    scale = (1 + .5 * torch.tanh(per_head(F.softplus(p['gamma']), relative)))[..., None]
    bias = F.softplus(p['phase_bias'])[:, None, None] * alignment(cos, sin, p['band_logits'])
    return closed(attend(q * scale, k * scale, v * scale if scaled_values else v, drop, bias, M), x, p, drop)

def dynamic_phase_attention(x, p, cos, sin, m, M, drop):
    H, S = p['base_gamma'].shape
    q, k, v = qkv(x, p, H)
    change = linear(F.gelu(linear(x.mean(1), p, 'context_mlp.0')), p, 'context_mlp.2').view(-1, 2, H, S)
    gamma, logits = p['base_gamma'] + change[:, 0], p['base_band_logits'] + change[:, 1]
    relative = m / (m.mean(-1, keepdim=True) + 1e-8)
    scale = (1 + .5 * torch.tanh(per_head(F.softplus(gamma), relative)))[..., None]
    rise = relative / (relative.mean(1, keepdim=True) + 1e-8)
    burst = F.relu(rise - F.pad(rise, (0, 0, 1, 0))[:, :-1]).sum(-1)                    # (B,L)
    louder = 1 + F.softplus(p['burst_weight'])[:, None, None] * burst[:, None, :, None]
    bias = F.softplus(p['base_phase_bias'])[:, None, None] * alignment(cos, sin, logits)
    return closed(attend(q * scale, k * scale, v * louder, drop, bias, M), x, p, drop)

def pswrec(p, ids, layer, gate=None, penalised=True, bands=None, drop=keep):
    x, M = drop(norm(embedded(ids, p, drop), p, 'LayerNorm')), mask(ids)                # twice, as published
    phi, m = (a[..., :bands] for a in phases(x, under(p, 'phase_filter')))
    cos, sin = phi.cos(), phi.sin()
    if gate: cos, sin = gated(cos, sin, m, *gate)
    for q in layers(p, 'encoder.layers'):
        x = feed_forward(layer(x, under(q, 'attn'), cos, sin, phi, m, M), under(q, 'ffn'), 'layer_norm', drop)
    return x, phase_steps(cos, sin) if penalised else 0.

def pswrecv13(p, ids, drop=keep):
    bands = p['encoder.layers.0.attn.gamma'].shape[1]                                   # spare ones are not used
    def layer(x, q, cos, sin, phi, m, M): return turned_attention(x, q, phi, m, M, drop)
    return pswrec(p, ids, layer, bands=bands, drop=drop)

def pswrecv13_norot(p, ids, gate=None, scaled_values=False, drop=keep):
    def layer(x, q, cos, sin, phi, m, M): return phase_attention(x, q, cos, sin, m, M, scaled_values, drop)
    return pswrec(p, ids, layer, gate, drop=drop)

def pswrecv13_vam(p, ids, drop=keep): return pswrecv13_norot(p, ids, scaled_values=True, drop=drop)

def pswrecv13_softmag(p, ids, tau=.5, temperature=.5, drop=keep):
    return pswrecv13_norot(p, ids, gate=(tau, temperature), drop=drop)

def pswrecv1111_residual_dynamic(p, ids, drop=keep):
    def layer(x, q, cos, sin, phi, m, M): return dynamic_phase_attention(x, q, cos, sin, m, M, drop)
    return pswrec(p, ids, layer, penalised=False, drop=drop)

def scan(u, dt, A, B, C):
    "The state-space recurrence, step by step: u, dt (B,L,E), A (E,N), B, C (B,L,N) -> (B,L,E)"
    decay, inflow = torch.exp(dt[..., None] * A), (dt * u)[..., None] * B[:, :, None]    # (B,L,E,N) each
    h, out = u.new_zeros(len(u), *A.shape), []
    for t in range(u.shape[1]):
        h = decay[:, t] * h + inflow[:, t]
        out.append((h * C[:, t, None]).sum(-1))
    return torch.stack(out, 1)

def mamba(x, p, phi, dm):
    L, E, N, R = x.shape[1], *p['A_log'].shape, p['dt_proj.weight'].shape[1]
    u, z = linear(x, p, 'in_proj').chunk(2, -1)
    k = p['conv1d.weight'].shape[-1]
    u = F.silu(F.conv1d(u.transpose(1, 2), p['conv1d.weight'], p['conv1d.bias'], padding=k - 1, groups=E)[..., :L]).transpose(1, 2)
    dt, B, C = linear(u, p, 'x_proj').split([R, N, N], -1)
    dt = F.softplus(linear(dt, p, 'dt_proj')) * (1 + F.softplus(dm.mean(-1, keepdim=True)))
    C = C + linear(torch.cat([phi.cos(), phi.sin()], -1), p, 'phase_proj')
    y = scan(u, dt, -torch.exp(p['A_log']), B, C) + p['D'] * u
    return norm(linear(y * F.silu(z), p, 'out_proj') + x, p, 'layer_norm')

def vmamba(p, ids, drop=keep):
    x, f = drop(norm(embedded(ids, p, drop), p, 'LayerNorm')), under(p, 'phase_filter')
    phi, m = phases(x, f)
    change = F.gelu(F.conv1d(x.transpose(1, 2), f['modulator.0.weight'], f['modulator.0.bias']))
    change = F.conv1d(change, f['modulator.2.weight'], f['modulator.2.bias']).transpose(1, 2)
    dm, dphi = torch.tanh(change).chunk(2, -1)
    m, phi = m * (1 + dm), phi + math.pi / 4 * dphi
    x = x * (1 + .5 * torch.tanh((F.softplus(p['gamma']) * m).sum(-1, keepdim=True)))
    for q in layers(p, 'encoder.layers'): x = mamba(x, q, phi, dm)
    return x, 0.


# one door for all

def outputs(family, params, ids, **config):
    "Hidden states (B,L,D) and the phase penalty, 0 where the model has none"
    if family not in FAMILIES: raise ValueError(f'no family {family!r}')
    return globals()[family](params, ids, **config)

def hidden(family, params, ids, **config): return outputs(family, params, ids, **config)[0]

def loss(family, params, ids, answers, neg=None, **config):
    "The published training loss at the last position: over every row of the table, or (if there is one) over a negative item"
    h, penalty = outputs(family, params, ids, **config)
    E, last = params['item_embeddings.weight'], h[:, -1]
    if family not in ('sasrec', 'fmlprec', 'gru4rec') or neg is None:
        return F.cross_entropy(last @ E.T, answers) + PENALTY * penalty
    yes, no = (last * E[answers]).sum(-1), (last * E[neg]).sum(-1)
    if family == 'gru4rec': return -torch.log(1e-10 + torch.sigmoid(yes - no)).mean()
    if family == 'sasrec': return F.softplus(-yes).mean() + F.softplus(no).mean()
    return (-torch.log(torch.sigmoid(yes) + 1e-24) - torch.log(1 - torch.sigmoid(no) + 1e-24)).mean()


# parameters of any size

def ffn_shapes(D, I, ln):
    return {'dense_1.weight': (I, D), 'dense_1.bias': (I,), 'dense_2.weight': (D, I), 'dense_2.bias': (D,), f'{ln}.weight': (D,), f'{ln}.bias': (D,)}

def attention_shapes(D, out, ln):
    linears = {f'{n}.{k}': s for n in ('query', 'key', 'value', out) for k, s in (('weight', (D, D)), ('bias', (D,)))}
    return {**linears, f'{ln}.weight': (D,), f'{ln}.bias': (D,)}

def prefixed(name, shapes): return {f'{name}.{k}': s for k, s in shapes.items()}

def mixer_shapes(family, L, D, H, S):
    "What stands in a layer, without its feed-forward part"
    if family == 'sasrec': return attention_shapes(D, 'dense', 'LayerNorm')
    ln = {'LayerNorm.weight': (D,), 'LayerNorm.bias': (D,)}
    if family == 'fmlprec': return {'complex_weight': (1, L // 2 + 1, D, 2), **ln}
    if family == 'bsarec':
        return {**prefixed('filter_layer', {'sqrt_beta': (1, 1, D), **ln}), **prefixed('attention_layer', attention_shapes(D, 'dense', 'LayerNorm'))}
    if family == 'wearec':
        K = L // 2 + 1
        return {'complex_weight': (1, H, L // 2, D // H), 'base_filter': (H, K, 1), 'base_bias': (H, K, 1), 'gate_param': (),
                'adaptive_mlp.0.weight': (D, D), 'adaptive_mlp.0.bias': (D,), 'adaptive_mlp.2.weight': (2 * H * K, D),
                'adaptive_mlp.2.bias': (2 * H * K,), **ln}
    attn = attention_shapes(D, 'out_proj', 'layer_norm')
    if family == 'pswrecv13': return {'gamma': (1, H, 1, 1), **attn}
    if family != 'pswrecv1111_residual_dynamic': return {'gamma': (H, S), 'band_logits': (H, S), 'phase_bias': (H,), **attn}
    return {'base_gamma': (H, S), 'base_band_logits': (H, S), 'base_phase_bias': (H,), 'burst_weight': (H,), 'context_mlp.0.weight': (D // 2, D),
            'context_mlp.0.bias': (D // 2,), 'context_mlp.2.weight': (2 * H * S, D // 2), 'context_mlp.2.bias': (2 * H * S,), **attn}

def mamba_shapes(D, S, N):
    E, R = 2 * D, math.ceil(D / 16)
    return {'A_log': (E, N), 'D': (E,), 'in_proj.weight': (2 * E, D), 'conv1d.weight': (E, 1, 4), 'conv1d.bias': (E,), 'x_proj.weight': (R + 2 * N, E),
            'dt_proj.weight': (E, R), 'dt_proj.bias': (E,), 'out_proj.weight': (D, E), 'layer_norm.weight': (D,), 'layer_norm.bias': (D,),
            'phase_proj.weight': (N, 2 * S)}

def shapes(family, n_items=40, L=9, D=32, n_heads=4, kernels=(3, 7, 15, 31), n_layers=2, inner=None, n_states=64):
    "Name -> shape of every published parameter; `n_heads` is the number of bands in pswrecv13 as well"
    inner, S = inner or 4 * D, len(kernels)
    out = {'item_embeddings.weight': (n_items + 1, D), 'position_embeddings.weight': (L, D)}
    if family == 'gru4rec':
        gru = {f'gru_layers.weight_{a}_l{n}': (3 * D, D) for n in range(n_layers) for a in ('ih', 'hh')}
        return {**out, **gru, 'dense.weight': (D, D), 'dense.bias': (D,)}
    out |= {'LayerNorm.weight': (D,), 'LayerNorm.bias': (D,)}
    if family in FAMILIES[5:]: out |= {f'phase_filter.{part}_convs.{s}.weight': (D, 1, k) for part in ('real', 'imag') for s, k in enumerate(kernels)}
    if family == 'vmamba':
        out |= {'gamma': (S,), 'phase_filter.modulator.0.weight': (D // 2, D, 1), 'phase_filter.modulator.0.bias': (D // 2,),
                'phase_filter.modulator.2.weight': (2 * S, D // 2, 1), 'phase_filter.modulator.2.bias': (2 * S,)}
    for i in range(n_layers):
        if family == 'vmamba': out |= prefixed(f'encoder.layers.{i}', mamba_shapes(D, S, n_states)); continue
        top, mixer, ffn, ln = (f'encoder.layers.{i}', 'attn', 'ffn', 'layer_norm') if family in FAMILIES[5:] else \
                              (f'item_encoder.blocks.{i}', 'layer', 'feed_forward', 'LayerNorm')
        out |= prefixed(f'{top}.{mixer}', mixer_shapes(family, L, D, n_heads, S)) | prefixed(f'{top}.{ffn}', ffn_shapes(D, inner, ln))
    return out

def random_params(family, seed=0, dtype=torch.float32, **sizes):
    "Parameters of a size that trained ones have, so that no branch is too weak to be seen: {published name: Tensor}"
    g, out = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes(family, **sizes).items():
        x = torch.randn(shape, generator=g, dtype=torch.float64)
        last = name.split('.')[-2:]
        if name.endswith('A_log'): x = torch.log(torch.arange(1., shape[1] + 1, dtype=torch.float64)) + .1 * x
        elif 'norm' in last[0].lower() and last[1] == 'weight': x = 1 + .2 * x
        elif len(shape) > 1 and last[-1] == 'weight' and 'embedding' not in name: x = x / math.sqrt(x[0].numel())
        elif last[-1] in ('D', 'base_filter'): x = 1 + .3 * x
        else: x = .3 * x
        out[name] = x.to(dtype)
    return out

# the golden files' own parameters and windows, and their losses: these need no data set

LEFT_PADDED = torch.tensor([[3, 8, 1, 22, 7, 9, 2, 14], [0, 0, 0, 0, 0, 0, 4, 6], [0, 0, 0, 11, 12, 13, 17, 2], [0, 0, 0, 0, 0, 0, 0, 19]])
ANSWERS, NEGATIVES = torch.tensor([10, 1, 4, 22]), torch.tensor([3, 2, 9, 12])
NINE = torch.cat([torch.tensor([[5], [0], [0], [0]]), LEFT_PADDED], 1)
TINY = dict(n_items=22, L=8, D=16, n_heads=4)
GOLDEN = {  # name: (family, changed sizes, settings, ids, published loss)
    'sasrec': ('sasrec', {}, dict(n_heads=4), LEFT_PADDED, 2.533419),
    'fmlprec': ('fmlprec', {}, {}, LEFT_PADDED, 2.769050),
    'bsarec': ('bsarec', {}, dict(n_heads=4, alpha=.7, c=3), LEFT_PADDED, 4.583776),
    'gru4rec': ('gru4rec', {}, {}, LEFT_PADDED, .616366),
    'wearec_L8': ('wearec', {}, dict(alpha=.3), LEFT_PADDED, 5.108963),
    'wearec_L9': ('wearec', dict(L=9), dict(alpha=.3), NINE, 4.158286),
    'pswrecv13': ('pswrecv13', {}, {}, LEFT_PADDED, 4.417768),
    'pswrecv13_norot': ('pswrecv13_norot', {}, {}, LEFT_PADDED, 4.239727),
    'pswrecv13_norot_h2': ('pswrecv13_norot', dict(n_heads=2), {}, LEFT_PADDED, 4.208082),
    'pswrecv13_vam': ('pswrecv13_vam', {}, {}, LEFT_PADDED, 4.099691),
    'pswrecv13_softmag': ('pswrecv13_softmag', {}, dict(tau=.5, temperature=.5), LEFT_PADDED, 4.198834),
    'pswrecv1111_residual_dynamic': ('pswrecv1111_residual_dynamic', {}, {}, LEFT_PADDED, 4.227782),
    'vmamba': ('vmamba', {}, {}, LEFT_PADDED, 3.004452)}

def filled(family, **sizes):
    "The deterministic fill of the golden files: .25 sin(.7 i + 1.3 k) in the k-th name of the sorted list"
    out, named = {}, shapes(family, **{**TINY, **sizes})
    for k, name in enumerate(sorted(named)):
        x = .25 * torch.sin(.7 * torch.arange(math.prod(named[name]), dtype=torch.float64) + 1.3 * k).view(named[name])
        if 'norm' in name.lower() and name.endswith('weight'): x = x + 1
        if name.endswith('A_log'): x = torch.log(torch.arange(1., x.shape[1] + 1)).expand(x.shape)
        out[name] = x.float().contiguous()
    return out
