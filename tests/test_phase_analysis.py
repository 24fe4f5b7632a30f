"Parts turned off, looks into phases and heads, exchanged items, fast and slow users."
import copy
from dataclasses import replace
import numpy as np, pytest, torch
from conftest import needs_data
from matplotlib.figure import Figure
from seqrec_nb.analysis import phase as look
from seqrec_nb.analysis.ablation import CUTS, ablate, ablation, parts, without
from seqrec_nb.analysis.pace import (clocked, gaps, gaps_from, pace, paces, read_gaps, same_histories,
                                     user_gap)
from seqrec_nb.analysis.sensitivity import Exchanged, disturbed, octaves, sensitivity, substitutes
from seqrec_nb.blocks.phase import PhaseBank
from seqrec_nb.core import Batch, reseed
from seqrec_nb.data.formats import DataError
from seqrec_nb.data.loader import EvalLoader
from seqrec_nb.data.planted import synthetic
from seqrec_nb.data.sequences import Sequences
from seqrec_nb.data.splits import leave_one_out, load
from seqrec_nb.metrics import Ranks, per_user
from seqrec_nb.models.base import create
from seqrec_nb.models.baselines import Markov, Popularity

BANK = {'phase', 'imaginary'}
NOROT = BANK | {'bias', 'amplitude'}
PARTS = {'sasrec_bsa': set(), 'fmlprec': {'filter'}, 'bsarec': {'filter', 'attention', 'high', 'scaling'},
         'wearec': {'fourier', 'wavelet', 'adaptive'}, 'pswrec_v13': BANK | {'amplitude'}, 'pswrec_v13_norot': NOROT,
         'pswrec_v13_vam': NOROT | {'values'}, 'pswrec_softmag': NOROT | {'gate'},
         'pswrec_v1111': NOROT | {'burst', 'person'}, 'pswrec_v1111_literal': NOROT | {'modulator'},
         'pswrec_v1111_step': NOROT | {'modulator'}, 'pswrec_vmamba': BANK | {'amplitude', 'modulator', 'readout'}}
V, L = 40, 11

def made(name, published=False, **kw):
    "A small model none of whose weights is 0"
    reseed(0, 'phase analysis', name)
    m = create(name, V, d_model=16, max_len=L, as_published=published, init_std=.2, **kw).eval()
    with torch.no_grad():
        for p in m.parameters(): p.add_(.3 * torch.randn_like(p))
    return m

@pytest.fixture(scope='module')
def data(): return synthetic(n_users=60, n_items=V + 20, longest=55, seed=5)

@pytest.fixture
def batch():
    reseed(1, 'phase analysis')
    n = torch.tensor([L, 7, 3, 1])
    return Batch(torch.randint(1, V + 1, (4, L)) * (torch.arange(L) < n[:, None]))

def apart(a, b, batch): return (a.scores(batch) - b.scores(batch))[:, 1:].abs().max().item()

def borrow(m, other):
    "Give the model the other's weights, where it has such"
    state = other.state_dict()
    m.load_state_dict({k: state[k] for k in m.state_dict()})
    return m

# ---- parts ----

@pytest.mark.parametrize('published', (False, True))
@pytest.mark.parametrize('name', PARTS)
@torch.no_grad()
def test_every_part_can_be_turned_off_and_matters(name, published, batch):
    m = made(name, published)
    before = copy.deepcopy(m)
    assert set(parts(m)) == PARTS[name]
    for part in parts(m):
        twin = without(m, part)
        assert twin.scores(batch)[:, 1:].isfinite().all(), part
        if (name, part) != ('pswrec_v13', 'amplitude'): assert apart(m, twin, batch) > 1e-5, part
        assert apart(without(twin, part) if part in parts(twin) else twin, twin, batch) == 0, part
    assert apart(m, before, batch) == 0

def test_every_cut_is_found_in_some_model():
    assert {c.name for c in CUTS} == set().union(*PARTS.values())

@pytest.mark.parametrize('name, off, of, kw', [
    ('pswrec_v13_norot', ('bias', 'amplitude'), 'sasrec_bsa', dict(n_heads=4)),
    ('pswrec_v13', ('phase', 'amplitude'), 'sasrec_bsa', dict(n_heads=4)),
    ('pswrec_v13_vam', ('values',), 'pswrec_v13_norot', {}), ('pswrec_softmag', ('gate',), 'pswrec_v13_norot', {}),
    ('pswrec_v1111', ('burst', 'person'), 'pswrec_v13_norot', {}),
    ('pswrec_v1111_literal', ('modulator',), 'pswrec_v13_norot', {}),
    ('pswrec_v1111_step', ('modulator',), 'pswrec_v13_norot', {})])
@torch.no_grad()
def test_without_its_part_a_variant_is_the_simpler_model(name, off, of, kw, batch):
    m = made(name)
    simple = borrow(made(of, **kw), m)
    assert apart(without(m, *off), simple, batch) < 1e-4 < apart(m, simple, batch)

@torch.no_grad()
def test_equal_phases_make_no_bias(batch):
    m = made('pswrec_v13_norot')
    assert apart(without(m, 'phase'), without(m, 'bias'), batch) < 1e-4
    assert apart(without(m, 'bias', 'phase'), without(m, 'bias'), batch) < 1e-4

@torch.no_grad()
def test_branches_of_the_frequency_models(batch):
    for name, part, alpha in (('wearec', 'fourier', 0.), ('wearec', 'wavelet', 1.), ('bsarec', 'filter', 0.), ('bsarec', 'attention', 1.)):
        m = made(name)
        other = borrow(made(name, alpha=alpha), m)
        assert apart(without(m, part), other, batch) < 1e-5, (name, part)
        assert part not in parts(other)

def test_unknown_parts_are_named():
    with pytest.raises(ValueError, match="PSWRec 'baias': did you mean 'bias'"): without(made('pswrec_v13_norot'), 'baias')
    with pytest.raises(ValueError, match='gate'): without(made('pswrec_v13_norot'), 'gate')
    with pytest.raises(ValueError, match='AttentionRec has no part'): without(made('sasrec_bsa'), 'bias')

def test_ablation_of_several_seeds(data):
    loader = EvalLoader(data.test, L)
    models = [create('pswrec_v13_norot', data.n_items, d_model=16, max_len=L, init_std=.5) for _ in range(2)]
    found = [ablate(m, loader, ['bias', 'bias+amplitude']) for m in models]
    assert list(found[0]) == ['whole', 'bias', 'bias+amplitude']
    table = ablation({k: [f[k] for f in found] for k in found[0]}, 'HR@10')
    assert np.isclose(table['mean']['whole'], np.mean([per_user(f['whole'], 'HR@10').mean() for f in found]))
    x, y = (np.mean([per_user(f[k], 'HR@10') for f in found]) for k in ('bias+amplitude', 'whole'))
    assert np.isclose(table.change['bias+amplitude'], x - y) and table.change['whole'] == 0

# ---- looks ----

def tuned(f0, taps, dilation=1):
    bank = PhaseBank(1, (taps,), (dilation,))
    angle = 2 * torch.pi * f0 * dilation * torch.arange(taps).flip(0)
    with torch.no_grad(): bank.real[0].copy_(angle.cos()); bank.imag[0].copy_(angle.sin())
    return bank

@pytest.mark.parametrize('f0', (-.25, 0., .125))
def test_a_planted_tone_is_found(f0):
    found = look.responses(tuned(f0, 8, 2), n=33)
    at = found.set_index('frequency').gain
    assert np.isclose(at[f0], 8) and np.isclose(at.max(), 8)
    assert np.isclose(look.responses(tuned(f0, 8, 2), n=33, max_len=5).gain.max(), 3)   # two taps back at most

def test_phases_of_one_history():
    m, history = made('pswrec_v13_norot'), [5, 9, 2, 5, 9]
    t = look.phases_of(m, history)
    assert t.step.max() == 4 and t.item.tolist()[::4] == history and np.allclose(t.cos ** 2 + t['sin'] ** 2, 1, atol=1e-5)
    assert np.allclose(np.cos(t.angle), t.cos, atol=1e-5) and (t.magnitude > 0).all()
    hand = t.pivot(index='step', columns='band', values='angle').to_numpy()
    turn = t.pivot(index='step', columns='band', values='turn').to_numpy()
    assert np.isnan(turn[0]).all() and np.allclose(turn[1:], 2 - 2 * np.cos(np.diff(hand, axis=0)), atol=1e-4)
    assert look.phases_of(m, list(range(1, 31))).item.tolist()[::4] == list(range(20, 31))

@pytest.mark.parametrize('published', (False, True))
@pytest.mark.parametrize('name', ('pswrec_softmag', 'pswrec_vmamba'))
def test_phase_speed_counts_items_only(name, published, data):
    reseed(0, 'speed')
    m = create(name, data.n_items, d_model=16, max_len=L, as_published=published, init_std=.3)
    loader = EvalLoader(data.test, L, batch_size=7)
    each = [look.phases_of(m, data.test.history(r)).groupby('band').turn.mean() for r in range(len(data.test))]
    found = look.phase_speed(m, loader)
    mean = np.mean(each, axis=0)
    assert np.allclose(found.turn, mean, atol=1e-5) and (found.low < mean).all() and (mean < found.high).all()
    assert (found.n == len(data.test)).all() and np.allclose(2 - 2 * np.cos(np.radians(found.degrees)), mean, atol=1e-5)

def test_a_user_of_one_item_has_no_step():
    offsets = np.array([0, 3, 7])
    s = Sequences(np.array([1, 2, 3, 4, 1, 2, 3], np.int32), offsets, None, np.arange(2), np.arange(1, V + 1))
    d = leave_one_out(s)
    one = replace(d.test, start=np.array([1, 3]))                       # the first user: one item before the target
    m = made('pswrec_v13_norot')
    found, alone = (look.phase_speed(m, EvalLoader(x, L)) for x in (one, one.take([1])))
    assert (found.n == 1).all() and np.allclose(found.turn, alone.turn, atol=1e-6)

@pytest.mark.parametrize('published', (False, True))
@pytest.mark.parametrize('name', ('sasrec_bsa', 'bsarec', 'pswrec_v13', 'pswrec_v13_vam', 'pswrec_v1111'))
@torch.no_grad()
def test_weights_are_those_of_the_layer(name, published, batch):
    "The attention that is shown, times the values, is what the layer gives"
    for layer, x, places, *signals in look.attending(made(name, published), batch):
        w = look.looks(layer, x, places, *signals)
        q, k, v, _ = layer.tune(*layer.heads(x), x, places, *signals)
        real = places.real
        assert torch.allclose(layer.merge(w @ v)[real], layer(x, places, *signals)[real], atol=1e-4)
        assert torch.allclose(w.sum(-1), torch.ones_like(w[..., 0]), atol=1e-5) and not w.triu(1)[real[:, None].expand(w.shape[:3])].any()

def test_attention_without_the_bias():
    m, history = made('pswrec_v13_norot'), [3, 1, 4, 1, 5]
    whole, off = look.attention_of(m, history), look.attention_of(m, history, off='bias')
    assert whole.shape == (5, 5) and (np.diag(whole - off)[1:] > 0).all()
    ratio = np.log(whole[4] / off[4])                                   # the bias, up to a constant
    assert np.ptp(ratio) <= 2 * look.strengths(m).limit.to_numpy()[4] + 1e-4
    with pytest.raises(ValueError, match='did you mean'): look.attention_of(m, history, off='biass')

def test_amplitudes_and_strengths(data):
    reseed(0, 'amplitudes')
    m = create('pswrec_v13_norot', data.n_items, d_model=16, max_len=L)
    loader = EvalLoader(data.test, L, batch_size=16)
    fresh = look.amplitudes(m, loader)
    assert len(fresh) == 8 and np.allclose(fresh[['low', 'high']], 1 + .5 * np.tanh(4 * np.log1p(np.exp(-3))), atol=1e-4)
    assert (fresh.n == np.minimum(data.test.length, L).sum()).all()
    assert np.allclose(look.amplitudes(without(m, 'amplitude'), loader)['mean'], 1)
    found = look.strengths(m)
    assert np.allclose(found.strength, np.log1p(np.exp(-5))) and np.allclose(found.limit, found.strength / 2)
    assert np.allclose(found.filter(like='band').sum(axis=1), 1)

def test_models_without_phases_say_so(batch):
    with pytest.raises(ValueError, match='AttentionRec has no phases'): look.phases_of(made('sasrec_bsa'), [1, 2])
    with pytest.raises(ValueError, match='FMLPRec has no attention'): look.attending(made('fmlprec'), batch)
    with pytest.raises(ValueError, match='no phase bias'): look.strengths(made('pswrec_v13'))

def test_pictures(data):
    ax = Figure().subplots(2, 2)
    m = made('pswrec_v13_norot')
    assert len(look.plot_bands(look.responses(m.bank), ax[0, 0]).lines) == 4
    assert len(look.plot_phase(look.phases_of(m, [1, 2, 3]), 'angle', ax[0, 1]).lines) == 4
    w = look.attention_of(m, [1, 2, 3])
    assert look.plot_attention(w, ax[1, 0]).images[0].cmap.name == 'Greys'
    m = create('pswrec_v13_norot', data.n_items, d_model=16, max_len=L)
    assert len(look.plot_amplitude(look.amplitudes(m, EvalLoader(data.test, L)), ax[1, 1]).lines) == 2

# ---- sensitivity ----

class Reader(Popularity):
    "Scores that depend on the item `k` places from the end, and on nothing else"
    k = 1
    def scores(self, b, E=None):
        at = b.mask.sum(1) - self.k
        item = torch.where(at >= 0, b.items.gather(1, at.clamp_min(0)[:, None])[:, 0], 0)
        return torch.sin(item[:, None] * torch.arange(1, self.n_items + 2) * 1.7)

@pytest.mark.parametrize('k', (1, 2, 4))
def test_a_model_that_reads_one_item_is_sensitive_to_that_one(k, data):
    model = Reader.from_data(data); model.k = k
    found = sensitivity(model, EvalLoader(data.test, L, batch_size=16), (1, 2, 3, 4)).set_index(['measure', 'back'])
    for j in (1, 2, 3, 4): assert (found['mean']['moved', j] > .5) == (k == j) == (found['mean']['octaves', j] > 0)
    for j in {1, 2, 3, 4} - {k}: assert found['mean']['HR@10 change', j] == 0 == found['mean']['reciprocal rank', j]

def test_markov_reads_the_last_item(data):
    found = sensitivity(Markov.from_data(data), EvalLoader(data.test, L))
    assert (found[(found.measure == 'moved')]['mean'] > 0).tolist() == [True, False, False]

def test_substitutes_are_new_and_fair(data):
    other = substitutes(data.test, 0)
    for r, x in enumerate(other): assert x >= 1 and x not in data.test.history(r) and x != data.test.target[r]
    rows = data.test.take(np.zeros(4000, int))
    lacks = set(range(1, data.n_items + 1)) - {*rows.history(0).tolist(), int(rows.target[0])}
    assert set(substitutes(rows, 1).tolist()) == lacks

def test_who_has_everything_keeps_it():
    s = Sequences(np.array([1, 2, 3, 1, 2, 1], np.int32), np.array([0, 3, 6]), None, np.arange(2), np.arange(1, 4))
    test = leave_one_out(s).test
    assert substitutes(test, 0).tolist() == [0, 3]                      # the second lacks item 3 alone
    swapped = Exchanged(EvalLoader(test, 5), 1)
    assert swapped.possible.tolist() == [False, True]
    b = next(iter(swapped))
    assert b.items[b.row.argsort()].tolist() == [[1, 2], [1, 3]]

def test_the_exchange_depends_on_the_user_alone(data):
    "Not on batches, and on the window only through what it shows"
    def items(n, width, back=2):
        rows = {}
        for b in Exchanged(EvalLoader(data.test, width, n), back):
            rows |= {r: x[x > 0].tolist()[-6:] for r, x in zip(b.row.tolist(), b.items)}
        return rows
    assert items(7, 8) == items(64, 8) == items(64, 50)
    assert items(64, 8) != items(64, 8, 3)
    assert not Exchanged(EvalLoader(data.test, 4), 5).possible.any()    # out of sight
    with pytest.raises(ValueError, match='back=1'): Exchanged(EvalLoader(data.test, 4), 0)

def test_before_and_after_ask_the_same(data):
    reseed(0, 'before')
    m = create('pswrec_v13_norot', data.n_items, d_model=16, max_len=L, init_std=.5)
    found = disturbed(m, EvalLoader(data.test, L), (1, 9))
    for k, (a, b) in found.items():
        assert (a.user == b.user).all() and (a.n_candidates == b.n_candidates).all() and (a.target == b.target).all()
        assert (a.length >= k).all() and len(a) == (data.test.length >= k).sum()
    assert octaves(*found[1]).max() > 0

def test_octaves_by_hand():
    r = lambda above, ties=(0, 0, 0): Ranks(range(3), [5] * 3, [1, 2, 3], above, ties, [50] * 3)
    assert octaves(r([0, 7, 3]), r([1, 1, 3])).tolist() == [1, 2, 0]
    assert octaves(r([0, 0, 0], (2, 0, 0)), r([3, 0, 0])).tolist() == [1, 0, 0]   # a tie's middle
    with pytest.raises(ValueError): octaves(r([0, 0, 0]), r([0, 0, 0]).where([0, 1]))

# ---- pace ----

def table(times=True, **kw):
    s = Sequences(np.array([1, 2, 3, 2, 2, 1], np.int32), np.array([0, 4, 6]),
                  np.array([10, 20, 80, 81, 5, 65]) if times else None, np.array([1, 2]), np.array([10, 20, 30]))
    return replace(s, **kw)

def test_gaps_begin_anew_with_each_user():
    assert np.array_equal(gaps(table()), [np.nan, 10, 60, 1, np.nan, 60], equal_nan=True)
    assert gaps(table(unit='ms'))[1] == .01 and gaps(table(unit='day'))[1] == 864_000
    for s in (table(False), table(unit='order')):
        with pytest.raises(ValueError, match='no times'): gaps(s)

def test_gaps_come_from_another_file(tmp_path):
    path = tmp_path/'x.txt'
    path.write_text('2 20 10\t0 60\n1 10 20 30 20\t0 10 60 1\n')
    assert np.array_equal(gaps_from(path, table(False)), gaps(table()), equal_nan=True)
    (tmp_path/'x.tsv').write_text('user\titem\tdate\n1\t10\t2010-01-01\n1\t20\t2010-01-02\n1\t30\t2010-01-02\n'
                                  '1\t20\t2010-03-02\n2\t20\t2010-01-01\n2\t10\t2010-01-03\n')
    day = 86_400
    assert np.array_equal(gaps_from(tmp_path/'x.tsv', table(False)), [np.nan, day, 0, 59 * day, np.nan, 2 * day], equal_nan=True)

@pytest.mark.parametrize('text, error', [
    ('1 10 20\t0\n', 'line 1: 2 items, 1 gaps'), ('1 10\t0\n2 20 10\t0 -5\n', 'line 2: a gap of -5'),
    ('1 10 20\n', 'line 1: not a user'), ('1 10\t0 x\n', 'line 1'), ('', 'empty'), ('\t0\n', 'line 1')])
def test_broken_files_of_gaps(tmp_path, text, error):
    (tmp_path/'x.txt').write_text(text)
    with pytest.raises(DataError, match=error): read_gaps(tmp_path/'x.txt')

def test_other_histories_are_refused():
    s = table()
    same_histories(s, table(False))
    same_histories(s, table(items=np.array([3, 1, 2, 1, 1, 3], np.int32)), renamed=True)
    bad = {'other users': dict(user_ids=np.array([1, 3])), 'user 1': dict(offsets=np.array([0, 3, 6])),
           '2 of 6 items': dict(items=np.array([1, 3, 2, 2, 2, 1], np.int32))}
    for words, change in bad.items():
        with pytest.raises(ValueError, match=words): same_histories(s, table(**change))
    with pytest.raises(ValueError, match='4 pairs'):
        same_histories(s, table(items=np.array([1, 3, 2, 2, 2, 1], np.int32)), renamed=True)

def test_the_gap_before_the_target_does_not_count():
    s = table()
    test = leave_one_out(s).test                                        # user 2 is too short
    assert np.array_equal(user_gap(gaps(s), test), [35, np.nan], equal_nan=True)
    assert user_gap(np.array([np.nan, 10, 61, 9e9, np.nan, 0]), test, 'mean')[0] == 35.5
    with pytest.raises(ValueError, match="did you mean 'mean'"): user_gap(gaps(s), test, 'means')

def test_thirds_of_users():
    n = 90
    r = Ranks(np.arange(n), np.arange(n) + 5, np.ones(n), np.arange(n) % 20, np.zeros(n), np.full(n, 30))
    seconds = np.r_[np.arange(n - 1.) * 86_400, np.nan]                 # the last has no pace
    found = pace({'a': [r, r], 'b': replace(r, above=r.above * (seconds[r.user] < 1e5))}, seconds, 'HR@10').set_index(['group', 'model'])
    assert found.n.xs('a', level='model').tolist() == [30, 30, 29, 89]
    assert found['mean']['slow', 'b'] == 1 and found['mean']['fast', 'a'] == per_user(r.where(np.arange(30)), 'HR@10').mean()
    assert found.days['fast', 'a'] == 29 and found.length['fast', 'a'] == np.median(np.arange(30) + 5)
    low, high = found.low['fast', 'a'], found.high['fast', 'a']
    assert low < found['mean']['fast', 'a'] < high

def test_equal_paces_stay_together():
    n = 60
    r = Ranks(np.arange(n), np.full(n, 9), np.ones(n), np.zeros(n), np.zeros(n), np.full(n, 30))
    seconds = np.where(np.arange(n) < 50, 0., 3600.)
    found = pace({'a': r}, seconds).set_index('group')
    assert found.n[['fast', 'medium', 'slow']].tolist() == [50, 0, 10] and found['mean'].isna()['medium']
    with pytest.raises(ValueError, match='no user'): paces(clocked(r, np.full(n, np.nan)))

@needs_data
@pytest.mark.parametrize('name, file', [('LastFM', 'LastFM_with_dates.tsv'), ('Beauty', 'Beauty_timedelta.txt')])
def test_the_clocks_of_the_real_files_fit(name, file, data_dir):
    if not (data_dir/'timed'/file).exists(): pytest.skip(f'no {file}')
    d = load(data_dir/'sequences'/f'{name}.txt', 'P-bsa')
    gap = gaps_from(data_dir/'timed'/file, d.seqs)
    assert np.isnan(gap).sum() == d.n_users and np.nanmin(gap) >= 0 and (gap[~np.isnan(gap)] % 86_400 == 0).all()
    assert np.isfinite(user_gap(gap, d.test)[d.test.user]).all()
    with pytest.raises(ValueError, match='differ in'):
        s = replace(d.seqs, items=np.r_[d.seqs.items[1::-1], d.seqs.items[2:]])
        gaps_from(data_dir/'timed'/file, s)
