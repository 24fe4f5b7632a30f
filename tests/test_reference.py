"""Faithful models against the published ones: golden files, plain maths at other sizes, names, counts, what sees what.

`published` is an oracle written from the maths alone; its own right to judge is tested first.
"""
import numpy as np, pytest, torch
import torch.nn.functional as F
import published as ref
from conftest import needs_data
from seqrec_nb.core import Batch, reseed
from seqrec_nb.losses import CrossEntropy
from seqrec_nb.models import create, load_reference

NEEDS_HEADS = ('sasrec', 'bsarec')      # the number of heads cannot be read from their parameters
CAUSAL = {'sasrec', 'gru4rec', 'pswrecv13', 'pswrecv13_norot', 'pswrecv13_vam', 'vmamba'}
SETTINGS = dict(bsarec=dict(alpha=.7, c=5), wearec=dict(alpha=.4), pswrecv13_softmag=dict(tau=.3, temperature=.7))

def windows(L, n_items=40, seed=0):
    "Left-padded rows of every kind: empty, one item, half full, full"
    ids = torch.randint(1, n_items + 1, (6, L), generator=torch.Generator().manual_seed(seed))
    return ids * (torch.arange(L) >= L - torch.tensor([0, 1, 2, L // 2, L, L])[:, None])

def right(ids):
    "The same rows padded on the right, as the library's batches are"
    n = (ids > 0).sum(1, keepdim=True)
    at = torch.arange(ids.shape[1]) + ids.shape[1] - n
    return ids.gather(1, at.clamp_max(ids.shape[1] - 1)) * (at < ids.shape[1])

def config(family, n_heads=4):
    "Settings that cannot be read from the shapes, as the oracle calls them"
    return {**SETTINGS.get(family, {}), **(dict(n_heads=n_heads) if family in NEEDS_HEADS else {})}

OURS = dict(tau='gate_tau', temperature='gate_temperature')

def load(family, params, settings={}, **more):
    return load_reference(family, params, **{OURS.get(k, k): v for k, v in settings.items()}, **more)

def close(x, y, tol=1e-5):
    "Equal up to a share of the largest value"
    error = float((x.detach() - y.detach()).abs().max())
    assert error <= tol * max(1., float(y.detach().abs().max())), error

def last_loss(model, family, ids, answers, neg):
    "The training loss at the last position, through the library's own parts"
    if family not in ('sasrec', 'fmlprec', 'gru4rec'):
        b = Batch(right(ids), answers)
        out = model(b)
        return CrossEntropy()(model, out, b) + (out.aux or {}).get('penalty', 0.)
    out = model(Batch(right(ids)))
    h = Batch(right(ids)).at_last(out.h)
    yes, no = (model.score(h, out.E, items=i[:, None])[:, 0] for i in (answers, neg))
    if family == 'gru4rec': return -torch.log(1e-10 + torch.sigmoid(yes - no)).mean()
    if family == 'sasrec': return F.softplus(-yes).mean() + F.softplus(no).mean()
    return (-torch.log(torch.sigmoid(yes) + 1e-24) - torch.log(1 - torch.sigmoid(no) + 1e-24)).mean()

def grad_norm(parameters): return float(torch.sqrt(sum((p.grad.double() ** 2).sum() for p in parameters if p.grad is not None)))


# the oracle

@pytest.mark.parametrize('name', ref.GOLDEN)
def test_oracle_has_the_published_loss(name):
    family, sizes, settings, ids, value = ref.GOLDEN[name]
    found = ref.loss(family, ref.filled(family, **sizes), ids, ref.ANSWERS, ref.NEGATIVES, **settings)
    assert float(found) == pytest.approx(value, abs=2e-6)

def golden(data_dir, name):
    "(family, parameters, settings, arrays) of a golden file"
    if not (path := data_dir/'golden'/f'{name}.npz').is_file(): pytest.skip(f'no {path.name}')
    arrays = {k: torch.from_numpy(v) for k, v in np.load(path).items()}
    params = {k[7:]: arrays.pop(k) for k in list(arrays) if k.startswith('param::')}
    return ref.GOLDEN[name][0], params, ref.GOLDEN[name][2], arrays

FILES = [k for k in ref.GOLDEN if k not in ('wearec_L9', 'pswrecv13_norot_h2', 'pswrecv13_vam')]     # of those only the loss is known

@needs_data
@pytest.mark.parametrize('name', FILES)
def test_oracle_equals_the_golden_file(name, data_dir):
    family, params, settings, z = golden(data_dir, name)
    for k, v in ref.filled(family, **ref.GOLDEN[name][1]).items(): assert torch.allclose(v, params.pop(k).requires_grad_(), atol=2e-7)
    assert not params
    params = {k: v.requires_grad_() for k, v in golden(data_dir, name)[1].items()}
    close(ref.hidden(family, params, z['input_ids'], **settings), z['out'])
    loss = ref.loss(family, params, z['input_ids'], z['answers'], z['neg'], **settings)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(z['loss']), rel=1e-5)
    assert grad_norm(params.values()) == pytest.approx(float(z['grad_norm']), rel=1e-5)

LASTFM, BEAUTY, ML1M, SPORTS = (dict(n_items=n, L=50, D=64) for n in (3646, 12101, 3416, 18357))
COUNTS = [('sasrec', LASTFM, 336_704), ('fmlprec', LASTFM, 310_080), ('bsarec', LASTFM, 337_088), ('bsarec', BEAUTY, 878_208),
          ('wearec', dict(LASTFM, n_heads=2), 328_674), ('wearec', dict(BEAUTY, n_heads=8), 910_978), ('wearec', dict(ML1M, n_heads=2), 313_954),
          ('wearec', dict(SPORTS, n_heads=4), 1_283_906), ('wearec', dict(LASTFM, L=200, n_heads=2), 387_474),
          ('pswrecv13', LASTFM, 343_880), ('pswrecv13', BEAUTY, 885_000), ('pswrecv13', dict(LASTFM, n_heads=2), 343_876),
          ('pswrecv13_norot', LASTFM, 343_944), ('pswrecv13_norot', BEAUTY, 885_064), ('pswrecv13_norot', dict(LASTFM, n_heads=2), 343_908),
          ('pswrecv13_vam', LASTFM, 343_944), ('pswrecv13_softmag', LASTFM, 343_944), ('pswrecv1111_residual_dynamic', LASTFM, 350_224),
          ('vmamba', LASTFM, 349_676)]

@pytest.mark.parametrize('family, sizes, n', COUNTS, ids=str)
def test_oracle_has_the_published_number_of_parameters(family, sizes, n):
    assert sum(torch.Size(s).numel() for s in ref.shapes(family, **sizes).values()) == n


# the library

@needs_data
@pytest.mark.parametrize('name', FILES)
def test_golden_file(name, data_dir):
    "Hidden states of all rows, padding included, the loss and the norm of its gradient"
    family, params, settings, z = golden(data_dir, name)
    model = load(family, params, settings)
    assert not model.training
    close(model.reference_forward(z['input_ids']).detach(), z['out'])
    loss = last_loss(model, family, z['input_ids'], z['answers'], z['neg'])
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(z['loss']), rel=1e-5)
    assert grad_norm(model.parameters()) == pytest.approx(float(z['grad_norm']), rel=1e-5)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

@pytest.mark.parametrize('name', ref.GOLDEN)
def test_golden_fill(name):
    "The same without the files: VAM, odd windows and two heads on four bands have none"
    family, sizes, settings, ids, value = ref.GOLDEN[name]
    params = {k: v.requires_grad_() for k, v in ref.filled(family, **sizes).items()}
    model = load(family, {k: v.detach() for k, v in params.items()}, settings)
    close(model.reference_forward(ids).detach(), ref.hidden(family, params, ids, **settings).detach())
    loss, expected = last_loss(model, family, ids, ref.ANSWERS, ref.NEGATIVES), ref.loss(family, params, ids, ref.ANSWERS, ref.NEGATIVES, **settings)
    loss.backward(); expected.backward()
    assert float(loss.detach()) == pytest.approx(value, rel=1e-5)
    assert grad_norm(model.parameters()) == pytest.approx(grad_norm(params.values()), rel=1e-5)

SIZES = dict(odd=dict(L=9), one=dict(L=1), window=dict(L=50, n_heads=2), deep=dict(L=12, n_layers=3, inner=48), even=dict(L=10, D=16, n_heads=8),
             few_bands=dict(L=20, kernels=(3, 5), n_states=16, n_heads=2), one_layer=dict(L=7, n_layers=1, D=64))

def sizes(family, name):
    "Sizes that the family can have: a head is a band in pswrecv13, which may have spare ones"
    s = dict(dict(n_heads=4), **SIZES[name])
    if family == 'pswrecv13': s['n_heads'] = min(4, s['n_heads'])
    if family == 'gru4rec': s.pop('inner', None)
    return s

def pair(family, name, dtype=torch.float32, seed=0):
    "(ours, params, settings, ids): a model of ours with random published parameters"
    s = sizes(family, name)
    p, settings = ref.random_params(family, seed, **s), config(family, s['n_heads'])
    more = dict(dilations='1-2') if 'kernels' in s and family in ref.FAMILIES[5:] else {}
    return load(family, p, settings, **more).to(dtype), {k: v.to(dtype) for k, v in p.items()}, settings, windows(s['L'])

@pytest.mark.parametrize('name', SIZES)
@pytest.mark.parametrize('family', ref.FAMILIES)
@torch.no_grad()
def test_equals_plain_maths_at_every_size(family, name):
    "In float64, as -10000 rounds the scores of padding queries in float32"
    model, p, settings, ids = pair(family, name, torch.float64)
    close(model.reference_forward(ids), ref.hidden(family, p, ids, **settings))
    real = (ids > 0)[..., None]
    model, p, settings, ids = pair(family, name)
    h = ref.hidden(family, p, ids, **settings)
    close(model.reference_forward(ids) * real, h * real, 5e-5)

@pytest.mark.parametrize('name', ('odd', 'window', 'one'))
@pytest.mark.parametrize('family', ref.FAMILIES)
@torch.no_grad()
def test_a_right_padded_batch_ends_where_the_published_window_does(family, name):
    model, _, _, ids = pair(family, name, torch.float64)
    expected, n_items = model.reference_forward(ids)[:, -1], 40
    width = max(1, int((ids > 0).sum(1).max()))
    for items in (right(ids), right(ids)[:, :width]):
        for target in (None, torch.arange(len(ids)) % n_items + 1):
            b = Batch(items, target)
            close(b.at_last(model(b).h), expected, 1e-7)
        close(model.scores(Batch(items)), expected @ model.table().T, 1e-7)
    short = right(ids)[1:4]
    short = short[:, :max(1, int((short > 0).sum(1).max()))]                 # a batch of short rows is narrower
    close(Batch(short).at_last(model(Batch(short)).h), expected[1:4], 1e-7)

@pytest.mark.parametrize('family', ref.FAMILIES)
def test_loss_and_gradient_equal_plain_maths(family):
    "By parameter: what the loss of the last position says to each of them"
    model, p, settings, ids = pair(family, 'odd')
    p, answers, neg = {k: v.requires_grad_() for k, v in p.items()}, torch.arange(6) * 5 + 1, torch.arange(6) * 3 + 2
    loss, expected = last_loss(model, family, ids, answers, neg), ref.loss(family, p, ids, answers, neg, **settings)
    close(loss.detach(), expected.detach())
    loss.backward(); expected.backward()
    assert grad_norm(model.parameters()) == pytest.approx(grad_norm(p.values()), rel=1e-4)
    close(model.item.weight.grad, p['item_embeddings.weight'].grad, 1e-4)
    still = [k for k, v in p.items() if v.grad is None]
    assert still == [k for k in p if k.endswith('gate_param') or family == 'gru4rec' and k.startswith('position')]
    silent = sum(v.grad is None or not v.grad.any() for v in p.values())
    assert sum(q.grad is None for q in model.parameters()) <= silent

@pytest.mark.parametrize('family, sizes, n', COUNTS, ids=str)
def test_number_of_parameters(family, sizes, n):
    "Of every published checkpoint, at its own size"
    named = {k: torch.zeros(v) for k, v in ref.shapes(family, **sizes).items()}
    model = load(family, named, config(family))
    assert sum(q.numel() for q in model.parameters()) == n

NAMES = dict(pswrecv13='pswrec_v13', pswrecv13_norot='pswrec_v13_norot', pswrecv13_vam='pswrec_v13_vam', pswrecv13_softmag='pswrec_softmag',
             pswrecv1111_residual_dynamic='pswrec_v1111', vmamba='pswrec_vmamba', sasrec='sasrec_bsa', fmlprec='fmlprec', bsarec='bsarec', wearec='wearec')


# what sees what: the facts that were measured on the published code

def moved(forward, ids, at, cells):
    "The largest change in `cells` (B,L) when the items in column `at` change"
    other = ids.clone()
    other[:, at] = ids[:, at] % 40 + 1
    change = (forward(other) - forward(ids)).abs().amax(-1)
    return float((change * cells).max())

def facts(forward, pad, L, left=True):
    "What moves before a changed item, on which cells; and what the padding's vector moves at the end"
    full = torch.randint(1, 41, (3, L), generator=torch.Generator().manual_seed(1))
    before = (torch.arange(L) < L - 3).expand(3, L)
    part = full * (torch.arange(L) >= L // 2) if left else full * (torch.arange(L) < L - L // 2)
    if not left: before = torch.arange(L) < L - L // 2 - 3
    at = L - 3 if left else L - L // 2 - 3
    out = dict(full=moved(forward, full, L - 3, torch.arange(L) < L - 3), padded=moved(forward, part, at, before & (part > 0)))
    if left: out['pads'] = moved(forward, part, at, part == 0)
    h = forward(part)
    with pad: changed = forward(part)
    end = L - 1 if left else L - L // 2 - 1
    out['row'] = float((changed - h)[:, end].abs().max())
    return out

class swapped:
    "Inside, the padding row of a table is noise"
    def __init__(self, table): self.table = table
    def __enter__(self):
        self.before = self.table[0].clone()
        self.table[0] = torch.randn(self.before.shape, generator=torch.Generator().manual_seed(2))
    def __exit__(self, *_): self.table[0] = self.before

def expect_published(family, found):
    free = family in CAUSAL
    assert (found['full'] == 0) == free and (found['padded'] == 0) == free
    assert (found['pads'] == 0) == (family in ('gru4rec', 'vmamba'))          # padding queries look at everything, harmlessly
    assert (found['row'] == 0) == (family == 'sasrec')

@pytest.mark.parametrize('family', ref.FAMILIES)
@torch.no_grad()
def test_what_the_oracle_sees(family):
    p = ref.random_params(family, **sizes(family, 'odd') | dict(L=16))
    expect_published(family, facts(lambda ids: ref.hidden(family, p, ids, **config(family)), swapped(p['item_embeddings.weight']), 16))

@pytest.mark.parametrize('family', ref.FAMILIES)
@torch.no_grad()
def test_what_the_published_model_sees(family):
    "Time means and transforms look ahead; padding is live input everywhere but in SASRec"
    p = ref.random_params(family, **sizes(family, 'odd') | dict(L=16))
    model = load(family, p, config(family))
    assert model.causal == (family in CAUSAL)
    expect_published(family, facts(model.reference_forward, swapped(model.item.weight), 16))

def corrected(name, **kw):
    "One of our models with weights large enough to be seen"
    reseed(0)
    model = create(name, 40, **{'d_model': 16, 'max_len': 16, **kw}).eval()
    for q in model.parameters(): torch.nn.init.normal_(q, std=.3)
    return model

@pytest.mark.parametrize('family', NAMES)
@torch.no_grad()
def test_what_the_corrected_model_sees(family):
    "Padding is never read, and every model but the three transforms is causal, to the last bit"
    model = corrected(NAMES[family])
    found = facts(lambda items: model(Batch(items)).h, swapped(model.item.weight), 16, left=False)
    assert model.causal == (family not in ('fmlprec', 'bsarec', 'wearec'))
    assert (found['full'] == 0) == model.causal and (found['padded'] == 0) == model.causal and found['row'] == 0


# what is loaded, and what is refused

LOADED = dict(L=9, D=16, n_layers=1)

def loaded(family='wearec', change=None, **kw):
    p = ref.random_params(family, **LOADED)
    if change: change(p)
    return load(family, p, {**config(family), **kw})

@pytest.mark.parametrize('family', ('pswrec', 'WEARec2', '', 'sasrec_bsa'))
def test_unknown_family(family):
    with pytest.raises(ValueError, match='famil'): load_reference(family, ref.random_params('wearec', **LOADED))

def ending(key):
    "What an error must say of a tensor, at least: `dense_1.weight`, `gamma`"
    last = key.split('.')[-2:]
    return '.'.join(last) if last[-1] in ('weight', 'bias') else last[-1].removeprefix('base_')

@pytest.mark.parametrize('family', ref.FAMILIES)
def test_every_key_counts(family):
    "A tensor that is missing, surplus or of another shape is named, as its own code calls it"
    for key in ref.shapes(family, **LOADED):
        def without(p): del p[key]
        def longer(p): p[key] = torch.cat([p[key].reshape(-1), torch.zeros(1)])
        if not key.endswith('gate_param'):
            with pytest.raises(ValueError) as e: loaded(family, without)
            assert ending(key) in str(e.value)
        with pytest.raises(ValueError) as e: loaded(family, longer)
        assert ending(key) in str(e.value)
    def surplus(p): p['encoder.layers.0.attn.surprise'] = torch.zeros(1)
    with pytest.raises(ValueError, match=r'attn\.surprise'): loaded(family, surplus)

@torch.no_grad()
def test_names_of_a_wrapped_model():
    "DataParallel puts `module.` before every name"
    p = ref.random_params('wearec', **LOADED)
    wrapped = load('wearec', {f'module.{k}': v for k, v in p.items()})
    assert torch.equal(wrapped.reference_forward(windows(9)), load('wearec', p).reference_forward(windows(9)))

@torch.no_grad()
def test_gate_param_says_nothing():
    def gates(p): p.update({k: torch.tensor(9.) for k in p if k.endswith('gate_param')})
    def bare(p):
        for k in [k for k in p if k.endswith('gate_param')]: del p[k]
    ids = windows(9)
    assert torch.equal(loaded().reference_forward(ids), loaded(change=gates).reference_forward(ids))
    try: model = loaded(change=bare)
    except (KeyError, ValueError) as e: assert 'gate_param' in str(e)
    else: assert torch.equal(loaded().reference_forward(ids), model.reference_forward(ids))

@pytest.mark.parametrize('dtype', (torch.float64, torch.float16, torch.bfloat16))
@torch.no_grad()
def test_other_dtypes(dtype):
    "A checkpoint saved in another precision is computed in float32, or stays what it is"
    exact = {k: v.to(dtype) for k, v in ref.random_params('wearec', **LOADED).items()}
    h = load_reference('wearec', exact).reference_forward(windows(9))
    close(h.float(), ref.hidden('wearec', {k: v.float() for k, v in exact.items()}, windows(9)), 1e-5)

@torch.no_grad()
def test_arrays_and_parameters_are_weights_too():
    p, ids = ref.random_params('bsarec', **LOADED), windows(9)
    h = load('bsarec', p, config('bsarec')).reference_forward(ids)
    for other in ({k: v.numpy() for k, v in p.items()}, {k: torch.nn.Parameter(v) for k, v in p.items()}):
        assert torch.equal(load('bsarec', other, config('bsarec')).reference_forward(ids), h)

@pytest.mark.parametrize('family', ref.FAMILIES)
@torch.no_grad()
def test_settings_that_agree_with_the_weights_are_accepted(family):
    p, agreed = ref.random_params(family, **LOADED), dict(max_len=9, n_blocks=1, d_model=16, dropout=0.)
    if family not in ('fmlprec', 'gru4rec', 'vmamba'): agreed['n_heads'] = 4
    said, silent = (load(family, p, {**config(family), **kw}).reference_forward(windows(9)) for kw in (agreed, {}))
    assert torch.equal(said, silent)

@torch.no_grad()
def test_the_callers_weights_are_copied():
    p = ref.random_params('wearec', **LOADED)
    before = {k: v.clone() for k, v in p.items()}
    for q in load_reference('wearec', p).parameters(): q.zero_()
    assert all(torch.equal(p[k], v) for k, v in before.items())

@pytest.mark.parametrize('family, kw, said', [
    ('wearec', dict(max_len=8), 'max_len'), ('wearec', dict(max_len=10), 'max_len'), ('sasrec', dict(max_len=5), 'max_len'),
    ('sasrec', dict(n_heads=3), 'heads'), ('wearec', dict(n_heads=2), 'heads'), ('wearec', dict(alhpa=.3), 'alpha'),
    ('sasrec', dict(n_blocks=2), 'blocks'), ('pswrecv13_norot', dict(n_blocks=3), 'blocks'), ('fmlprec', dict(d_model=8), 'd_model')], ids=str)
def test_settings_that_contradict_the_weights_are_refused(family, kw, said):
    with pytest.raises((ValueError, TypeError)) as e: loaded(family, **kw)
    assert said in str(e.value)

@pytest.mark.parametrize('shape', ((2, 8), (2, 10), (9,)), ids=str)
def test_windows_of_another_width_are_refused(shape):
    with pytest.raises(ValueError, match='9'): loaded().reference_forward(torch.zeros(shape, dtype=torch.long))
