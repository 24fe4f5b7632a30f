"Ranks by counting: against a loop, with repeats, ties, NaN, wide catalogues; the model leaves as it came."
import numpy as np, pytest, torch
from torch import nn
from seqrec_nb.core import Batch, generator
from seqrec_nb.data.loader import EvalLoader
from seqrec_nb.data.planted import synthetic
from seqrec_nb.data.sequences import Sequences
from seqrec_nb.data.splits import leave_one_out
from seqrec_nb.evaluate import EvaluationError, cold, counts, rankings, ranks
from seqrec_nb.metrics import averages, hr
from seqrec_nb.models.baselines import Markov, Popularity

class Given(nn.Module):
    "A model with a score for every row of the split"
    def __init__(self, s):
        super().__init__()
        self.s, self.n_items, self.calls, self.tables = torch.as_tensor(s), np.shape(s)[1] - 1, 0, 0
        self.drop = nn.Dropout(.5)
    def table(self): self.tables += 1
    def scores(self, b, E=None):
        assert not (self.training or self.drop.training or torch.is_grad_enabled())
        self.calls += 1
        return self.s[b.row]

def sequences(items, offsets, n_items):
    "These histories, split leave-one-out"
    return leave_one_out(Sequences(np.asarray(items, np.int32), np.asarray(offsets), None,
                                   np.arange(len(offsets) - 1), np.arange(1, n_items + 1)))

def with_repeats(users=80, n_items=12, seed=0):
    "Histories of random items, in which items come back, the target among them"
    rng = np.random.default_rng(seed); n = rng.integers(3, 25, users)
    return sequences(rng.integers(1, n_items + 1, n.sum()), np.r_[0, n.cumsum()], n_items)

def few_values(rows, n_items, dtype=torch.float32, values=4):
    s = torch.randint(values, (rows, n_items + 1), generator=generator(1)).to(dtype) / 3
    s[:, 0] = 99                                        # padding is loud and must not be heard
    return s

def slow_ranks(s, data, mask):
    "One user at a time, item by item"
    found = []
    for r in range(len(data.test)):
        t = data.test.target[r]
        out = set(data.test.history(r).tolist()) - {t} if mask else set()
        rivals = [s[r, j].item() for j in range(1, s.shape[1]) if j not in out and j != t]
        st = s[r, t].item()
        found.append((sum(x > st for x in rivals), sum(x == st for x in rivals), len(rivals) + 1))
    return np.array(found).T

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_against_a_loop(dtype):
    data = with_repeats()
    s = few_values(len(data.test), data.n_items, torch.float64).mul(3).to(dtype)
    both = rankings(Given(s), EvalLoader(data.test, batch_size=17))
    for name, mask in (('masked', True), ('unmasked', False)):
        r = both[name]
        assert np.array_equal(np.stack([r.above, r.ties, r.n_candidates]), slow_ranks(s, data, mask))
        assert np.array_equal(r.target, data.test.target) and np.array_equal(r.user, data.test.user)
        assert np.array_equal(r.length, data.test.length)
        assert np.array_equal(vars(ranks(Given(s), EvalLoader(data.test), mask))['above'], r.above)

def test_the_target_is_never_masked():
    data = with_repeats()
    s = few_values(len(data.test), data.n_items)
    had = [t in data.test.history(r) for r, t in enumerate(data.test.target)]
    assert any(had) and not all(had)
    s[torch.arange(len(s)), torch.as_tensor(data.test.target.astype(int))] = 50.
    r = rankings(Given(s), EvalLoader(data.test))
    assert all((x.above == 0).all() and (x.ties == 0).all() for x in r.values())

def test_masked_is_never_worse():
    data = synthetic(200, seed=0)
    r = rankings(Markov.from_data(data), EvalLoader(data.test))
    m, u = r['masked'], r['unmasked']
    assert (m.above <= u.above).all() and (m.above < u.above).any()
    assert (m.above + m.ties <= u.above + u.ties).all()
    assert averages(m)['HR@10'] >= averages(u)['HR@10']

@pytest.mark.parametrize('mask', [True, False])
def test_a_constant_scorer_gets_k_of_n(mask):
    data = with_repeats()
    r = ranks(Given(np.full((len(data.test), 13), .7)), EvalLoader(data.test), mask)
    assert np.allclose(hr(r, 5), np.minimum(5 / r.n_candidates, 1) * (r.n_candidates > 1), rtol=1e-15)
    if not mask: assert (hr(r, 5) == 5 / 12).all()

def test_random_scores_get_k_of_n():
    data = synthetic(1000, seed=0)
    r = ranks(Given(torch.rand(1000, 201, generator=generator(2))), EvalLoader(data.test), mask_seen=False)
    assert abs(hr(r, 10).mean() - .05) < 4 * (.05 * .95 / 1000) ** .5

def test_a_user_who_has_seen_everything():
    "The target is the only candidate left: rank 0 for any scores, and n_candidates says what that is worth"
    data = sequences([1, 2, 3, 4, 5, 1, 2, 3], [0, 5, 8], 5)
    r = ranks(Given(torch.rand(2, 6)), EvalLoader(data.test))
    assert r.n_candidates.tolist() == [1, 3] and r.above[0] == r.ties[0] == 0

@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('column', ['target', 'other', 'seen'])
def test_broken_scores_raise(value, column):
    data = with_repeats()
    s = torch.rand(len(data.test), data.n_items + 1)
    t, h = int(data.test.target[33]), int(data.test.history(33)[0])
    s[33, {'target': t, 'other': t % 12 + 1, 'seen': h}[column]] = value
    with pytest.raises(EvaluationError, match=r'1 of 80 .*rows \[33\], users \[33\]'):
        ranks(Given(s), EvalLoader(data.test))

def test_padding_may_hold_anything():
    data = with_repeats()
    s = torch.rand(len(data.test), data.n_items + 1); clean = ranks(Given(s), EvalLoader(data.test))
    s[:, 0] = np.nan
    assert np.array_equal(ranks(Given(s), EvalLoader(data.test)).above, clean.above)

def test_large_scores_are_no_error():
    data = with_repeats()
    s = torch.rand(len(data.test), data.n_items + 1) * 3e38
    assert len(ranks(Given(s), EvalLoader(data.test))) == 80

def test_no_targets_is_an_error():
    class Blind(EvalLoader):
        def __iter__(self):
            for b in super().__iter__(): yield Batch(b.items, None, b.user, b.length, row=b.row)
    data = with_repeats()
    model = Given(torch.rand(80, 13))
    with pytest.raises(EvaluationError, match='no targets'): ranks(model, Blind(data.test))
    class Zero(EvalLoader):
        def __iter__(self):
            for b in super().__iter__(): b.target = b.target * 0; yield b
    with pytest.raises(EvaluationError, match='no target'): ranks(model, Zero(data.test))

@pytest.mark.parametrize('rows', [1, 7, 80, 1000])
def test_pieces_do_not_matter(rows):
    data = with_repeats()
    s = few_values(len(data.test), data.n_items); model = Given(s)
    loader = EvalLoader(data.test, batch_size=50)
    a, b = counts(model, loader), counts(model, loader, max_scores=rows * 13)
    assert np.array_equal(a, b) and model.tables == 2
    assert model.calls == 2 + sum(-(-n // rows) for n in (50, 30))

def test_no_more_scores_than_asked_at_once():
    sizes = []
    class Wide(Given):
        def scores(self, b, E=None): sizes.append(len(b)); return super().scores(b)
    data = with_repeats()
    counts(Wide(torch.rand(80, 13)), EvalLoader(data.test, batch_size=80), max_scores=100)
    assert max(sizes) == 7

def test_the_model_leaves_as_it_came():
    "Also a frozen part that was in evaluation mode, and also after an error"
    data = with_repeats(); model = Given(torch.rand(80, 13)); model.train(); model.drop.eval()
    ranks(model, EvalLoader(data.test))
    assert model.training and not model.drop.training
    model.s[0, 3] = np.nan
    with pytest.raises(EvaluationError): ranks(model, EvalLoader(data.test))
    assert model.training and not model.drop.training and torch.is_grad_enabled()

def test_permuted_items_leave_the_metrics(seed=0):
    "Other ids for the same items: popularity, with all its ties, gets the same figures"
    data, perm = synthetic(300, seed=1), np.r_[0, np.random.default_rng(0).permutation(200) + 1]
    other = sequences(perm[data.seqs.items], data.seqs.offsets, 200)
    for cls in (Popularity, Markov):
        a, b = (rankings(cls.from_data(d), EvalLoader(d.test)) for d in (data, other))
        for k in a: assert np.array_equal(a[k].above, b[k].above) and averages(a[k]) == averages(b[k])

def test_batch_size_and_window_do_not_matter():
    data = synthetic(200, seed=0); model = Markov.from_data(data)
    a, b = ranks(model, EvalLoader(data.test, batch_size=9)), ranks(model, EvalLoader(data.test, max_len=1))
    assert all(np.array_equal(x, y) for x, y in zip(vars(a).values(), vars(b).values()))
    assert b.length.max() > 50                          # the true length, although the model saw one item

def test_cold_targets():
    data = sequences([1, 2, 3, 4, 5, 6, 2, 3, 1, 2, 1, 3, 1, 4], [0, 4, 8, 12, 14], 6)
    # training: 1 2, 5 6, 1 2, and 1 4 of a user too short to test
    r = ranks(Popularity.from_data(data), EvalLoader(data.test))
    assert r.target.tolist() == [4, 3, 3] and cold(r, data).tolist() == [False, True, True]
