"Serving: what a person asks, what the model answers, and that the one is never taken for something else."
import json, shutil, subprocess, sys, warnings
import numpy as np, pandas as pd, pyarrow.parquet as pq, pytest, torch
from conftest import ROOT
import seqrec_nb.models                                    # fills the registry
import seqrec_nb.histories as histories
import seqrec_nb.recommend as serving
from seqrec_nb.catalogue import Finder, RequestError, UnknownTitle
from seqrec_nb.checkpoint import CheckpointError
from seqrec_nb.core import reseed
from seqrec_nb.data.interactions import Interactions
from seqrec_nb.data.loader import EvalLoader
from seqrec_nb.data.planted import synthetic
from seqrec_nb.data.splits import load
from seqrec_nb.evaluate import EvaluationError, ranks
from seqrec_nb.experiment import Experiment, run
from seqrec_nb.flags import UsageError
from seqrec_nb.histories import Histories, top
from seqrec_nb.models.base import model_class
from seqrec_nb.models.sasrec import SASRec
from seqrec_nb.recommend import Recommender, UnseenItems, candidate_tables, rank, recommend, split_histories
from seqrec_nb.recommending import bars
from seqrec_nb.recommending import recommend as command

SMALL = dict(d_model=8, n_blocks=1, n_heads=1, max_len=10)
RAW = dict(whole=list(range(0, 60, 2)),                                        # gaps, and the id 0
           wide=[-2**62, -7, 0, *range(2**33, 2**33 + 27)],                    # negative, more than 32 bits
           text=['007', '07', '7', '0', 'caf\u00e9', 'cafe\u0301', '🎬', 'שלום', 'a\tb', 'x' * 10_000, *(f'B{i:03}' for i in range(20))])

def log(names, users=40, seed=0):
    "Walks around a ring of the named items, some leaps, repeats; every item occurs"
    rng = np.random.default_rng(seed); n = rng.integers(3, 25, users)
    walks = [(rng.integers(len(names)) + rng.choice([1, 1, 1, 2, 7], k).cumsum()) % len(names) for k in n]
    walks[0] = np.arange(len(names)); n[0] = len(names)
    item = pd.Series([names[i] for w in walks for i in w], dtype='int64' if isinstance(names[0], int) else object)
    return pd.DataFrame(dict(user=np.repeat(np.arange(users), n), item=item, timestamp=np.arange(n.sum()) + 10**9))

def served(kind='whole', titles=None, **kw):
    "A SASRec of random weights and its data: nothing here needs it trained"
    data = load(Interactions.read(log(RAW[kind], **kw), titles=titles))
    reseed(0, 'weights')
    return Recommender(SASRec(data.n_items, **SMALL), data, kind)

@pytest.fixture(scope='module')
def rec(): return served()

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A finished run"
    here = tmp_path_factory.mktemp('made')
    log(RAW['whole']).to_csv(here/'ring.csv', index=False)
    return run(Experiment(data=here/'ring.csv', **SMALL, batch_size=16, lr=1e-2, epochs=2, patience=0, threads=1), here/'run')

@pytest.fixture
def own(made, tmp_path): return shutil.copytree(made, tmp_path/'own')

def quiet(f, *a, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UnseenItems)
        return f(*a, **kw)

def same(a, b, atol=1e-6):
    assert a.items == b.items and a.source == b.source
    np.testing.assert_allclose(a.scores, b.scores, rtol=0, atol=atol)

def popular(rec, k=10):
    "By hand: most frequent in the training rows; of equals the one that comes first in the catalogue"
    items = pd.Series(np.concatenate([rec.data.train.history(r) for r in range(len(rec.data.train))]))
    count = items.value_counts().reindex(range(1, rec.data.n_items + 1), fill_value=0)
    best = sorted(count.index, key=lambda i: (-count[i], i))[:k]
    return [rec.catalogue.id(i) for i in best], [float(count[i]) for i in best]

# ---- row 23: unseen items ----

@pytest.mark.parametrize('kind, strange', [('whole', [1, 59, 60, 10**6, -1, 10**30]), ('whole', ['??', '006', '+6', ' 6', '1', '-3', '6.0', '1٦', 'x' * 9999]),
                                           ('wide', [1, 2**33 + 27, -8]), ('text', ['??', '7 ', '00', 'cafe', 'B020', '', 'B00\x00'])], ids=lambda x: str(x)[:30])
def test_unseen_items_are_dropped_and_counted(kind, strange):
    "Before, between and after known items, alone, all at once: a warning, a count, never an index error or another item"
    rec = served(kind); known = [str(x) if isinstance(strange[0], str) else x for x in RAW[kind][2:5]]
    want = rec(known, k=5)
    for x in strange:
        with pytest.warns(UnseenItems, match='1 unseen'): got = rec([known[0], x, *known[1:]], k=5)
        assert (got.dropped, got.n_dropped, got.used) == ([x], 1, 3) and 'unseen' in repr(got)
        same(got, want)
    got = quiet(rec, [*strange, *known, *strange], k=5)
    assert got.n_dropped == 2 * len(strange); same(got, want)
    got = quiet(rec, strange, k=5)
    assert got.source == 'fallback' and got.dropped == strange

def test_twin_without_the_catalogue_an_unseen_item_is_an_index_error_or_another_item(monkeypatch, rec):
    "A look-up by binary search, as is often written: past the end an index error, in a gap silently the neighbour"
    assert quiet(rec, [2, 61]).dropped == [61] and quiet(rec, [2, 5]).dropped == [5]
    monkeypatch.setattr(Finder, 'find', lambda self, x, by='auto': int(np.searchsorted(self.ids, x)) + 1)
    with pytest.raises(IndexError): rec([2, 61])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        got = rec([2, 5])
    assert got.dropped == [] and got.history == ['2', '6']              # 5 has become 6, and nobody was told

def test_twin_without_dropping_padding_stands_inside_a_history(monkeypatch, rec):
    want = quiet(rec, [2, 61, 4, 6])
    monkeypatch.setattr(histories, 'known', lambda numbers: list(range(len(numbers))))
    monkeypatch.setattr(serving, 'answer', lambda rec, items, values, *rest: (items, values))
    items, values = quiet(rec, [2, 61, 4, 6])                           # no error: the last item is read at the wrong place
    assert not np.allclose(values, want.scores, atol=1e-4)

def test_times_of_unseen_items_go_with_them():
    data = synthetic(n_users=60, n_items=120, seed=0)
    rec = Recommender(data.oracle, data)
    raw = rec.catalogue.raw; t = [10**9, 10**9 + 100, 10**9 + 10**7, 10**9 + 10**7 + 50]
    same(quiet(rec, [raw[3], -5, raw[8]], times=t), rec([raw[3], raw[8]], times=[t[0], *t[2:]]))
    assert rec([raw[3], raw[8]], times=[t[0], t[1], t[1] + 1]).scores != rec([raw[3], raw[8]], times=[t[0], t[1], t[2]]).scores

# ---- row 24: nothing is known ----

@pytest.mark.parametrize('kind', RAW)
def test_nothing_known_gives_popular_items_and_says_so(kind):
    rec = served(kind); stranger = 'nobody'
    items, counts = popular(rec)
    assert len(set(counts)) < 10                                        # ties, so that their rule matters
    odd = '??' if kind == 'text' else 10**7 + 1
    for got, note in [(rec([]), 'the history is empty'), (quiet(rec, [odd]), 'every item is unseen'), (rec.user(stranger), "user 'nobody' is unknown"),
                      (rec.user(10**9), 'user 1000000000 is unknown'), (quiet(rec.many, [[RAW[kind][0]], []])[1], 'the history is empty')]:
        assert (got.items, got.scores, got.source, got.note, got.used) == (items, counts, 'fallback', note, 0)
        assert 'popular' in repr(got) and 'popular' in got._repr_markdown_()
    assert rec([RAW[kind][0]]).source == 'model'
    assert rec([], exclude=items[:2], k=3).items == items[2:5]

def test_twin_without_the_fallback_the_model_answers_about_padding(monkeypatch, rec):
    h = histories.lay_out([[], [3, 4]])
    assert rec.many([[], [4, 6]])[0].items == popular(rec)[0]
    monkeypatch.setattr(serving, 'answerable', lambda length: np.arange(len(length)))
    numbers, values = rank(rec, h, 10)                                  # nothing raises
    assert [rec.catalogue.id(n) for n in numbers[0]] != popular(rec)[0] and not np.array_equal(values[0], values[0].round())
    with pytest.raises(IndexError): rec([])                             # and alone it has not even a column

# ---- what is recommended ----

def test_seen_items_are_never_recommended_and_a_short_answer_says_why(rec):
    had = RAW['whole'][3:20] * 2                                        # more than the window
    got = rec(had, k=1000)
    assert set(got.items) == set(RAW['whole']) - set(had) and got.used == 34 and len(got) == 13
    assert 'only 13 of 1000' in repr(got) and 'only' not in repr(rec(had, k=13))
    assert rec(had, k=50, exclude=[0, 2]).items == [i for i in got.items if i not in (0, 2)]
    everything = rec(RAW['whole'])
    assert (len(everything), everything.source) == (0, 'model') and 'only 0 of 10' in repr(everything)
    assert everything._repr_markdown_() and everything.frame().empty

def test_twin_without_the_mask_a_seen_item_comes_back(monkeypatch, rec):
    nothing = torch.zeros(0, dtype=torch.long)
    monkeypatch.setattr(Histories, 'flat', lambda self, rows: (nothing, nothing))
    assert set(rec(RAW['whole']).items) & set(RAW['whole'])

@pytest.mark.parametrize('given, message', [
    (dict(k=0), 'at least 1'), (dict(k=-3), 'at least 1'), (dict(k=2.), 'whole number'), (dict(k='5'), 'whole number'), (dict(k=True), 'whole number'), (dict(k=None), 'whole number'),
    (dict(history='Heat'), r"one string: write a list, \['Heat'\]"), (dict(history=None), 'a list is wanted'), (dict(history=5), 'a list is wanted'),
    (dict(history={2, 4}), 'got set'), (dict(history=pd.DataFrame(dict(item=[2]))), 'got DataFrame'), (dict(history=b'ab'), 'got bytes'),
    (dict(history=[float('nan')]), 'nan'), (dict(history=[2., 4.]), 'write 2'), (dict(history=[None]), 'None'), (dict(history=[True]), 'True'), (dict(history=np.array([1.5])), '1.5'),
    (dict(history=[[2, 4]]), 'many'), (dict(history=np.array([[2], [4]])), 'many'), (dict(history=[2, '4']), 'of one kind'), (dict(history=['4', 2]), 'of one kind'),
    (dict(exclude='4'), 'exclude is one string'), (dict(exclude=[[4]]), 'list within'), (dict(by='name'), "by='name'"), (dict(times=[1]), '1 times for 2 items'),
    (dict(times=[1, 2, 3, 4]), '4 times'), (dict(times=[5, 4]), 'times fall'), (dict(times=[1., 2.]), 'whole'), (dict(times=7), 'a list is wanted')], ids=str)
def test_questions_that_make_no_sense_have_a_named_error(rec, given, message):
    with pytest.raises(RequestError, match=message): rec(**{'history': [2, 4], **given})

def test_other_questions_that_make_no_sense(rec):
    for call, message in [(lambda: rec.user(2.), 'write 2'), (lambda: rec.user(None), 'None'), (lambda: rec.user(0, k=0), 'at least 1'), (lambda: rec.many('ab'), 'one string'),
                          (lambda: rec.many([2, 4]), 'a list is wanted'), (lambda: rec.many([[2]], batch_size=0), 'batch_size'), (lambda: rec.many([[2]], times=[]), '0 lists of times'),
                          (lambda: rec.why([2], 4), 'at least two'), (lambda: rec.why([2, 4], 5), 'unseen'), (lambda: Recommender(SASRec(7, **SMALL), rec.data), '7 items'),
                          (lambda: served('text')([7]), "write '7' and not 7")]:
        with pytest.raises(RequestError, match=message): call()

def test_arrays_series_and_numpy_integers_are_lists_too(rec):
    want = rec([2, 4])
    for history in (np.array([2, 4]), np.array([2, 4], np.int32), pd.Series([2, 4]), (2, 4), [np.int64(2), np.int64(4)], ['2', '4'], pd.Series(['2', '4']), range(2, 5, 2)):
        same(rec(history), want)
    assert {type(x) for x in want.items + served('text')(['7']).items} == {int, str} and type(want.scores[0]) is float

# ---- ids and titles ----

@pytest.mark.parametrize('kind', RAW)
def test_ids_come_back_exactly_as_they_were_written(kind):
    rec = served(kind)
    for x in RAW[kind]:
        got = rec([x], k=1000)
        assert got.used == 1 and sorted([x, *got.items]) == sorted(RAW[kind])

def test_item_id_0_is_an_item_like_any_other(rec):
    got = rec([0]); assert got.dropped == [] and got.history == ['0'] and 0 not in got.items
    assert 0 in rec([2], k=100).items and 0 not in rec([2], k=100, exclude=[0]).items

def test_a_number_that_no_item_has_is_an_error(rec):
    "Python's lists would give the last item for 0 - 1"
    assert rec.catalogue.id(1) == 0 and rec.catalogue.id(30) == 58
    for n in (0, -1, 31):
        with pytest.raises(IndexError, match='no item has the number'): rec.catalogue.id(n)

def test_twin_of_id_0_where_ids_are_taken_for_numbers(monkeypatch, rec):
    monkeypatch.setattr(Finder, 'find', lambda self, x, by='auto': int(x))
    assert quiet(rec, [0]).dropped == [0]                               # the item 0 has become padding

FILMS = {0: 'Heat (1995)', 2: 'Heathers (1989)', 4: 'Matrix, The (1999)', 6: 'Toy Story (1995)', 8: 'Toy Story 2 (1999)', 10: '12', 14: '1984', 16: 'Sabrina (1954)',
         18: 'Sabrina (1995)', 20: 'Am\u00e9lie (2001)', 22: 'Rocky IV (1985)', 24: 'Twins', 26: 'Twins', 28: 'STRASSE'}

@pytest.mark.parametrize('asked, item', [('Heat (1995)', 0), ('heat', 0), ('HEAT (1995)', 0), (' heat ', 0), ('Heath', 2), ('Heathres', 2), ('The Matrix', 4), ('matrix', 4), ('The Matrix (1999)', 4),
    ('Toy Story', 6), ('A Toy Story', 6), ('toy story 2', 8), ('12', 12), ('1984', 14), ('0', 0), ('Sabrina (1995)', 18), ('ame\u0301lie', 20), ('Rocky IV', 22), ('straße', 28)])
def test_titles_are_found(asked, item):
    rec = served(titles=FILMS)
    assert rec.catalogue.id(rec.catalogue.find(asked)) == item
    got = rec([asked], k=3); assert got.used == 1; same(got, rec([item], k=3))
    assert got.history == [FILMS.get(item, '12')] and set(got.titles) <= {str(x) for x in [*FILMS.values(), *RAW['whole']]}

@pytest.mark.parametrize('asked, message', [('toy', "2 items: 'Toy Story \\(1995\\)' \\(id 6\\), 'Toy Story 2"), ('Twins', '2 items'), ('Sabrina', '2 items'), ('Tory Stories', 'did you mean'),
    ('Heat (2013)', "did you mean 'Heat"), ('Rocky V', "did you mean 'Rocky IV"), ('Toy Story 3', 'did you mean')])
def test_doubtful_titles_are_asked_back(asked, message):
    rec = served(titles=FILMS)
    with pytest.raises(UnknownTitle, match=message): rec([asked])
    assert quiet(rec, [asked], by='id').dropped == [asked]

def test_what_is_looked_at_can_be_said():
    rec = served(titles=FILMS)
    assert rec.catalogue.find('12', 'auto') == rec.catalogue.find('12', 'id') != rec.catalogue.find('12', 'title')
    with pytest.raises(UnknownTitle, match='none is like it'): rec(['??'], by='title')
    with pytest.raises(RequestError, match='did you mean'): rec(['tory stories'], exclude=[4])
    assert quiet(rec, ['Heat'], by='id').dropped == ['Heat']

# ---- the same as offline ----

MODELS = ['sasrec', 'gru4rec', 'caser', 'bert4rec', 'hybridsasrecgnn', 'lightgcn', 'popularity', 'markov', 'cooccurrence']

def of(name, data):
    from seqrec_nb.models.base import settings
    reseed(1, 'weights'); f = model_class(name)
    return f.from_data(data, **{k: v for k, v in dict(SMALL, graph_min_count=1).items() if k in settings(f)})

@pytest.mark.parametrize('name', MODELS)
def test_the_answer_is_the_ranking_that_the_evaluation_measures(name, rec):
    data = rec.data; rec = Recommender(of(name, data), data, name); model = rec.model
    loader = EvalLoader(data.test, rec.max_len, batch_size=7); measured = ranks(model, loader)
    numbers, values = rank(rec, split_histories(rec, 'test')[1], data.n_items, batch_size=5)
    offline = torch.zeros(len(data.test), data.n_items + 1, dtype=torch.float64)
    with torch.inference_mode():
        for b in loader: offline[b.row] = model.eval().scores(b).double()
    checked = 0
    for r, target in enumerate(data.test.target):
        got = numbers[r][numbers[r] > 0]
        np.testing.assert_allclose(values[r][:len(got)], offline[r, got], rtol=0, atol=1e-6)
        assert set(got) == set(range(1, data.n_items + 1)) - set(data.test.history(r))
        if target in data.test.history(r): continue
        place = int((got == target).argmax()); checked += 1
        assert measured.above[r] <= place <= measured.above[r] + measured.ties[r]
    assert checked > 10
    mine = rec([rec.catalogue.id(i) for i in data.test.history(3)], k=5)
    assert mine.items == [rec.catalogue.id(i) for i in numbers[3][:5]]

@pytest.mark.parametrize('name', ['sasrec', 'bert4rec', 'hybridsasrecgnn', 'cooccurrence'])
@pytest.mark.parametrize('size', [1, 3, 256])
def test_many_are_each_alone(name, size, rec):
    rec = Recommender(of(name, rec.data), rec.data); rng = np.random.default_rng(size)
    lists = [rng.choice(RAW['whole'], n).tolist() for n in (1, 25, 0, 4, 10, 11, 2)] + [[61], [3, 2, 61]]
    got = quiet(rec.many, lists, 6, size)
    assert [r.source for r in got] == ['model'] * 2 + ['fallback'] + ['model'] * 4 + ['fallback', 'model']
    for history, r in zip(lists, got): same(quiet(rec, history, 6), r)
    assert rec.many([]) == []

def test_a_user_is_the_whole_history(rec):
    s = rec.data.seqs
    for u in (0, 5, 17):
        history = [rec.catalogue.id(i) for i in s[u]]
        got = rec.user(int(s.user_ids[u]), k=7); same(got, rec(history, k=7)); same(got, rec.user(str(s.user_ids[u]), k=7))
        assert got.history == [str(x) for x in history]
    assert rec.user('00').source == rec.user('05').source == 'fallback'          # not user 0, not user 5

def test_models_of_time_need_times():
    data = synthetic(n_users=60, n_items=120, seed=0); s = data.seqs
    rec = Recommender(data.oracle, data); raw = rec.catalogue.raw
    with pytest.raises(RequestError, match='give times'): rec(raw[:3])
    b = next(iter(EvalLoader(data.test, rec.max_len, time=True)))
    u, n = int(b.user[0]), int(b.length[0])
    history = [rec.catalogue.id(i) for i in s[u][:n]]; times = s.times[s.offsets[u]:s.offsets[u] + n + 1].tolist()
    got, want = rec(history, k=200, times=times), data.oracle.scores(b)[0]
    np.testing.assert_allclose(got.scores, [want[rec.catalogue.number[i]] for i in got.items], atol=1e-9)
    same(rec.many([raw[:2], history, []], 40, times=[[1, 2], times, []])[1], got)
    full = [rec.catalogue.id(i) for i in s[u]]; times = s.times[s.offsets[u]:s.offsets[u + 1]].tolist()
    same(rec.user(s.user_ids[u], 40), rec(full, 40, times=times))               # asked at the last item's time
    later = times[-1] + 10**7
    same(rec.user(s.user_ids[u], 40, now=later), rec(full, 40, times=[*times, later]))
    assert len(rec.why(full, rec.user(s.user_ids[u]).items[0], times=times)) == len(full)

def test_when_stored_users_are_asked():
    "At the time of their last item; in a split at that of the target, as in the evaluation; order without times has none"
    data = synthetic(n_users=60, n_items=120, seed=0); s = data.seqs; rec = Recommender(data.oracle, data)
    assert (split_histories(rec, 'all users')[1].now == [s.times[b - 1] for b in s.offsets[1:]]).all()
    assert (split_histories(rec, 'test')[1].now == s.times[data.test.stop]).all()
    h = split_histories(rec, 'valid')[1]; rows = np.arange(len(h))[::3]
    b = h.batch(rows, 12, True); want = {int(r): k for k, r in enumerate(rows)}
    for e in EvalLoader(data.valid, 12, batch_size=9, time=True):
        for j, r in enumerate(e.row.tolist()):
            if r not in want: continue
            n = min(12, int(e.length[j])); k = want[r]
            assert b.items[k, :n].equal(e.items[j, :n]) and b.time[k, :n + 1].equal(e.time[j, :n + 1]) and b.length[k] == e.length[j]
    assert split_histories(served(), 'test')[1].times is not None
    bare = load(Interactions.read(log(RAW['whole']).drop(columns='timestamp')))
    assert split_histories(Recommender(SASRec(bare.n_items, **SMALL), bare), 'test')[1].now is None

def test_scores_that_are_not_finite_are_no_recommendation():
    rec = served()
    with torch.no_grad(): rec.model.item.weight[5] = torch.nan
    with pytest.raises(EvaluationError, match='NaN'): rec([2, 4])

def test_the_table_follows_the_model(monkeypatch):
    data = served().data; rec = Recommender(of('hybridsasrecgnn', data), data)
    calls = []; table = rec.model.table
    monkeypatch.setattr(rec.model, 'table', lambda: calls.append(1) or table())
    first = rec([2, 4]); rec([6]); assert len(calls) == 1
    with torch.no_grad():
        for p in rec.model.parameters(): p.mul_(1.5)
    same(rec([2, 4]), Recommender(rec.model, data)([2, 4]))
    assert len(calls) == 3 and rec([2, 4]).scores != first.scores

def test_twin_of_a_table_that_is_computed_once():
    data = served().data; rec = Recommender(of('hybridsasrecgnn', data), data); frozen = rec.table()
    with torch.no_grad():
        for p in rec.model.parameters(): p.mul_(1.5)
    fresh = rec([2, 4])
    rec.table = lambda: frozen
    assert rec([2, 4]).scores != pytest.approx(fresh.scores, abs=1e-6)           # a mixture of two models, and no error

def test_asking_leaves_the_model_as_it_was(rec):
    rec.model.train(); rec.model.drop.eval()
    first = rec([2, 4]); assert rec.model.training and not rec.model.drop.training
    same(rec([2, 4]), first, 0); assert rec.model.item.weight.requires_grad and not rec.model.item.weight.is_inference()
    counted = Recommender(of('popularity', rec.data), rec.data); before = counted.model.pop.clone()
    counted([2, 4]); assert torch.equal(counted.model.pop, before)               # its scores are a view of its counts

# ---- the best k ----

@pytest.mark.parametrize('seed', range(8))
def test_top_k_is_a_sort_by_score_and_number(seed):
    g = torch.Generator().manual_seed(seed)
    s = torch.randint(0, 6, (40, 31), generator=g).float(); s[torch.rand(s.shape, generator=g) < .3] = -torch.inf
    s[0] = -torch.inf; s[1] = 2.
    for k in (1, 4, 30, 99):
        i, v = top(s, k)
        for r in range(40):
            want = sorted((n for n in range(1, 31) if s[r, n] > -torch.inf), key=lambda n: (-s[r, n], n))[:k]
            assert i[r][i[r] > 0].tolist() == want and v[r][:len(want)].tolist() == [s[r, n] for n in want] and not i[r][len(want):].any()

# ---- candidates ----

@pytest.mark.parametrize('split', ['test', 'valid', 'all users'])
@pytest.mark.parametrize('kind', ['whole', 'text'])
def test_candidates_are_the_answers_of_all_users(split, kind, tmp_path):
    rec = served(kind); path = rec.candidates(tmp_path/'c.parquet', k=4, split=split)
    t = pq.read_table(path).to_pandas(); s = rec.data.seqs
    assert list(t.columns) == ['user', 'rank', 'item', 'score'] and [p.name for p in tmp_path.iterdir()] == ['c.parquet']
    rows = getattr(rec.data, split, None)
    who = range(s.n_users) if rows is None else rows.user
    for n, u in enumerate(who):
        history = s[u] if rows is None else rows.history(n)
        got = t[t.user == s.user_ids[u]]; want = rec([rec.catalogue.id(i) for i in history], k=4)
        assert got['item'].tolist() == want.items and got['rank'].tolist() == [*range(1, len(want) + 1)]
        np.testing.assert_allclose(got.score, want.scores, rtol=0, atol=1e-6)
    assert set(t.user) <= set(s.user_ids[list(who)])

def test_candidates_come_in_chunks_and_the_file_whole_or_not_at_all(tmp_path, monkeypatch):
    rec = served(); whole = pd.concat(t.to_pandas() for t in candidate_tables(rec, 3, 'test'))
    parts = [t.to_pandas() for t in candidate_tables(rec, 3, 'test', chunk=7)]
    assert len(parts) == -(-len(rec.data.test) // 7) and all(p.user.nunique() <= 7 for p in parts)
    pd.testing.assert_frame_equal(pd.concat(parts, ignore_index=True), whole.reset_index(drop=True), atol=1e-6, rtol=0)
    path = tmp_path/'c.parquet'; path.write_text('old')
    def fails(*a): yield next(candidate_tables(rec, 3, 'test')); raise OSError('disk')
    monkeypatch.setattr(serving, 'candidate_tables', fails)
    with pytest.raises(OSError, match='disk'): rec.candidates(path)
    assert path.read_text() == 'old' and [*tmp_path.iterdir()] == [path]
    monkeypatch.undo()
    for kw, message in [(dict(split='tset'), "did you mean 'test'"), (dict(k=0), 'at least 1')]:
        with pytest.raises(RequestError, match=message): rec.candidates(path, **kw)

# ---- why ----

def test_why_is_the_fall_of_the_score(rec):
    history = [2, 8, 14, 20, 14]; item = rec(history).items[2]
    score = lambda h: dict(zip((r := rec(h, 100)).items, r.scores))[item]
    found = quiet(rec.why, [2, 8, 61, 14, 20, 14], item)
    assert found['item'].tolist() == history
    want = [score(history) - score(history[:i] + history[i + 1:]) for i in range(5)]
    np.testing.assert_allclose(found.support, want, atol=1e-6)
    assert len(rec.why(history * 5, item)) == SMALL['max_len']                   # only what the model reads can matter
    assert '+' in bars(found) and len(bars(found).splitlines()) == 5

# ---- runs ----

def test_three_ways_to_ask_a_run(made):
    rec = Recommender.load(made)
    assert rec.name.startswith('sasrec-ring') and not rec.model.training
    for way in (made, str(made), rec, (rec.model, rec.data)): same(recommend(way, [2, 4, 6, 8, 10, 12], k=3), rec([2, 4, 6, 8, 10, 12], k=3))
    m = json.loads((made/'metrics.json').read_text()); numbers, _ = rank(rec, split_histories(rec, 'test')[1], 10)
    hit = [t in row for row, t in zip(numbers, rec.data.test.target)]
    again = [t in rec.data.test.history(r) for r, t in enumerate(rec.data.test.target)]
    assert sum(hit) / len(hit) <= m['test_metrics']['HR@10'] <= (sum(hit) + sum(again)) / len(hit)

def test_runs_that_cannot_be_asked_say_why(own, tmp_path):
    with pytest.raises(FileNotFoundError, match='no run directory'): recommend(tmp_path/'nowhere', [2])
    weights = own/'best/model.safetensors'; raw = bytearray(weights.read_bytes())
    raw[-5] ^= 1; weights.write_bytes(raw)
    with pytest.raises(CheckpointError, match='has changed since it was saved'): recommend(own, [2])
    shutil.rmtree(own/'best')
    with pytest.raises(CheckpointError, match='no sound checkpoint'): recommend(own, [2])
    (own/'experiment.json').unlink()
    with pytest.raises(FileNotFoundError, match='no run directory'): recommend(own, [2])

def test_a_run_that_has_not_validated_yet_cannot_be_asked(made, tmp_path):
    shutil.copy(made/'experiment.json', tmp_path)
    with pytest.raises(CheckpointError, match='there is none'): recommend(tmp_path, [2])

def test_data_that_have_changed_are_refused(own):
    "The ids would be those of other items"
    e = json.loads((own/'experiment.json').read_text()); other = own/'other.csv'
    log(RAW['whole'], seed=1).to_csv(other, index=False)
    (own/'experiment.json').write_text(json.dumps({**e, 'data': str(other)}))
    with pytest.raises(CheckpointError, match='fingerprint'): recommend(own, [2])

# ---- the command ----

def test_the_command_answers(made, tmp_path, capsys):
    said = lambda *words: (command([str(made), *map(str, words)]), capsys.readouterr().out)[::-1]
    want = recommend(made, [2, 4], k=3)
    text, code = said(2, 4, '--k', 3, '--why')
    assert code == 0 and repr(want) in text and f'what speaks for {want.items[0]}:' in text and text.count('\n') == 9
    assert "1 unseen, dropped: '5'" in said(2, 5)[0] and 'popular items (the history is empty)' in said()[0]
    assert repr(recommend(made, [0], exclude=[6])) in said(0, '--exclude', 6)[0]
    assert repr(Recommender.load(made).user(3)) in said('--user', 3)[0] and 'unknown' in said('--user', '03', '--why')[0]
    assert 'what speaks for' in said('--user', 3, '--why')[0] and 'two known items' in said(2, '--why')[0]
    said('--candidates', tmp_path/'c.parquet', '--split', 'all users', '--k', 2)
    assert len(pq.read_table(tmp_path/'c.parquet')) >= 2 * 38

@pytest.mark.parametrize('words, message', [('2 --k 0', 'at least 1'), ('2 --k x', 'invalid int'), ('2 --user 3', 'one of them'), ('--why', 'needs a history'), ('2 --bye id', "did you mean '--by'"),
                                            ('2 --by name', 'by='), ('--candidates /tmp/x --split tset', "did you mean 'test'")])
def test_the_command_says_what_is_wrong(made, words, message):
    with pytest.raises(UsageError, match=message): command([str(made), *words.split()])

def test_help_is_light():
    code = "import sys, seqrec_nb.recommending as s\ntry: s.recommend(['--help'])\nexcept SystemExit: pass\nassert not {'torch', 'numpy', 'pandas'} & {*sys.modules}"
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and '--candidates' in done.stdout, done.stderr

def test_exclude_is_not_silently_ignored_for_candidates():
    from seqrec_nb.flags import UsageError
    with pytest.raises(UsageError, match='--exclude does not apply'): command(['run', '--candidates', 'x.parquet', '--exclude', '5'])
