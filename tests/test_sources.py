"Named data sets: where they are looked for, how they are fetched, and what a bad server or archive can do (nothing)."
import io, os, subprocess, zipfile
from hashlib import sha256
from urllib.error import URLError
import pytest
from seqrec_nb.data import sources
from seqrec_nb.data.sources import SOURCES, Archive, Source, SourceError, atomic, find

ROWS = b'userId,movieId,rating,timestamp\n1,2,3,978300760\n'

def zipped(**members) -> bytes:
    "A zip file; keys are names with __ for / and _ for ."
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', zipfile.ZIP_DEFLATED) as z:
        for name, data in members.items(): z.writestr(name.replace('__', '/').replace('_', '.'), data)
    return out.getvalue()

TOY = zipped(toy__ratings_csv=ROWS, toy__movies_csv=b'movieId,title\n2,Two\n', toy__big_bin=b'x')

def archive(data=TOY, address='https://example.org/toy.zip', sha=None, size=None, **members):
    members = members or dict(interactions='toy/ratings.csv', items='toy/movies.csv')
    return Archive(address, sha or sha256(data).hexdigest(), size or len(data), members)

@pytest.fixture
def world(monkeypatch, tmp_path):
    "An empty cache, no SEQREC_DATA, a registry with one set, and a server that answers what we say; returns a setter"
    monkeypatch.setenv('SEQREC_CACHE', str(tmp_path/'cache'))
    monkeypatch.delenv('SEQREC_DATA', raising=False)
    asked = []
    def serve(*archives, answer=TOY, files=None):
        monkeypatch.setitem(SOURCES, 'toy', Source('toy', 'https://example.org', files or {}, archives))
        answers = list(answer) if isinstance(answer, list) else None
        def urlopen(url, timeout):
            asked.append(url)
            data = answers.pop(0) if answers else answer
            if isinstance(data, Exception): raise data
            return data if hasattr(data, 'read') else io.BytesIO(data)
        monkeypatch.setattr(sources, 'urlopen', urlopen)
        return asked
    serve.cache = tmp_path/'cache'
    return serve

def left_over(folder): return sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file())

def test_download_then_cache(world):
    asked = world(archive())
    first = find('toy')
    assert first['interactions'].read_bytes() == ROWS and first['items'].exists()
    assert find('TOY') == first and len(asked) == 1, 'the second time comes from the cache; case does not matter'
    assert left_over(world.cache) == ['toy/movies.csv', 'toy/ratings.csv'], 'only listed members, no temporary files'

def test_own_folder_comes_first(world, monkeypatch, tmp_path):
    asked = world(archive())
    find('toy')
    own = tmp_path/'own'/'toy'/'ratings.csv'
    own.parent.mkdir(parents=True); own.write_bytes(ROWS)
    monkeypatch.setenv('SEQREC_DATA', str(tmp_path/'own'))
    assert find('toy') == {'interactions': own}, 'titles are optional, and one place gives all files'
    monkeypatch.setenv('SEQREC_DATA', str(tmp_path/'nowhere'))
    with pytest.raises(SourceError, match='nowhere.*not a folder'): find('toy')

def test_wrong_hash_is_deleted_tried_once_more_and_shown(world):
    bad = TOY[:-1] + b'?'
    asked = world(archive(), answer=bad)
    with pytest.raises(SourceError) as e: find('toy')
    assert len(asked) == 2 and left_over(world.cache) == []
    assert sha256(bad).hexdigest() in str(e.value) and sha256(TOY).hexdigest() in str(e.value)
    assert 'toy/ratings.csv' in str(e.value) and str(world.cache) in str(e.value), 'it says what to put where'

def test_a_broken_line_is_mended_by_the_second_try(world):
    asked = world(archive(), answer=[TOY[:50], TOY])
    assert find('toy')['interactions'].read_bytes() == ROWS and len(asked) == 2

def test_endless_answer_is_cut_off(world):
    class Endless(io.RawIOBase):
        sent = 0
        def read(self, n=-1): self.sent += n; return b'x' * n
    stream = Endless()
    world(archive(), answer=stream)
    with pytest.raises(SourceError, match='more than the'): find('toy')
    assert stream.sent <= len(TOY) + 3 * (1 << 20) and left_over(world.cache) == []

def test_second_source_is_used(world):
    asked = world(archive(address='https://a.example/x.zip'), archive(address='https://b.example/x.zip'),
                  answer=[URLError('no route'), TOY])
    assert find('toy')['interactions'].read_bytes() == ROWS
    assert asked == ['https://a.example/x.zip', 'https://b.example/x.zip']

@pytest.mark.parametrize('address', ['http://example.org/x.zip', 'ftp://example.org/x.zip', 'file:///etc/passwd'])
def test_https_only(world, address):
    asked = world(archive(address=address))
    with pytest.raises(SourceError, match='only https'): find('toy')
    assert asked == []

def test_hostile_members_are_not_written(world, tmp_path):
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as z:
        for name in ['../evil', '/etc/evil', 'toy/ratings.csv', 'C:\\evil']: z.writestr(name, ROWS)
        link = zipfile.ZipInfo('toy/link'); link.external_attr = 0o120777 << 16
        z.writestr(link, '/etc/passwd')
    world(archive(out.getvalue(), interactions='toy/ratings.csv'), answer=out.getvalue())
    find('toy')
    assert left_over(tmp_path) == ['cache/toy/ratings.csv']

def test_a_listed_member_gets_our_name_only(world, tmp_path):
    data = zipped(**{'..__..__ratings_csv': ROWS})
    name = zipfile.ZipFile(io.BytesIO(data)).namelist()[0]
    assert '/' in name and name.startswith('.')
    world(archive(data, interactions=name), answer=data)
    assert find('toy')['interactions'] == world.cache/'toy'/'ratings.csv'
    assert left_over(tmp_path) == ['cache/toy/ratings.csv']

def test_zip_bomb_is_refused(world):
    bomb = zipped(toy__ratings_csv=bytes(50_000_000))
    assert len(bomb) < 100_000
    world(archive(bomb, interactions='toy/ratings.csv'), answer=bomb)
    with pytest.raises(SourceError, match='50,000,000 bytes: refused'): find('toy')
    assert left_over(world.cache) == []

def test_what_is_no_zip_or_lacks_the_member(world):
    world(archive(b'hello'), answer=b'hello')
    with pytest.raises(SourceError, match='not a zip file'): find('toy')
    world(archive(interactions='toy/nothing.csv'))
    with pytest.raises(SourceError, match='no member'): find('toy')

def test_interactions_come_last(world, monkeypatch):
    "A set whose titles cannot be written must not look complete"
    world(archive(zipped(toy__ratings_csv=ROWS), interactions='toy/ratings.csv', items='toy/movies.csv'),
          answer=zipped(toy__ratings_csv=ROWS))
    with pytest.raises(SourceError): find('toy')
    assert left_over(world.cache) == []

def test_no_address_no_network_unknown(world):
    world(files={'interactions': 'sequences/Toy.txt'})
    with pytest.raises(SourceError) as e: find('toy')
    for part in ['no address', 'https://example.org', 'sequences/Toy.txt', str(world.cache), 'SEQREC_DATA']: assert part in str(e.value)
    world(archive(), answer=URLError('Name or service not known'))
    with pytest.raises(SourceError, match='Name or service not known'): find('toy')
    with pytest.raises(SourceError, match="did you mean 'ml-1m'"): find('ml-1n')

def test_wheel_by_pip(world, monkeypatch):
    "pip is asked for that file alone; its failure is reported; its file is checked like any other"
    calls = []
    def run(cmd, **kw):
        calls.append(cmd)
        if broken: return subprocess.CompletedProcess(cmd, 1, '', 'ERROR: no matching distribution')
        with open(os.path.join(cmd[cmd.index('-d') + 1], 'x-1-py3-none-any.whl'), 'wb') as f: f.write(TOY)
        return subprocess.CompletedProcess(cmd, 0, '', '')
    monkeypatch.setattr(sources.subprocess, 'run', run)
    broken = True
    world(archive(address='pypi:x==1'))
    with pytest.raises(SourceError, match='no matching distribution'): find('toy')
    broken = False
    assert find('toy')['interactions'].read_bytes() == ROWS
    assert 'x==1' in calls[-1] and '--no-deps' in calls[-1] and 'install' not in calls[-1]
    world(archive(address='pypi:x==1', sha='0' * 64)); (world.cache/'toy'/'ratings.csv').unlink()
    with pytest.raises(SourceError, match='wrong content'): find('toy')

def test_atomic(tmp_path):
    target = tmp_path/'a'/'b.txt'
    with atomic(target) as f: f.write(b'old')
    with pytest.raises(KeyboardInterrupt):
        with atomic(target) as f:
            f.write(b'new, half of')
            assert target.read_bytes() == b'old'
            raise KeyboardInterrupt
    assert target.read_bytes() == b'old' and left_over(tmp_path) == ['a/b.txt']

def test_cache_dir(monkeypatch, tmp_path):
    for k in ('SEQREC_CACHE', 'XDG_CACHE_HOME'): monkeypatch.delenv(k, raising=False)
    monkeypatch.setenv('HOME', str(tmp_path))
    assert sources.cache_dir() == tmp_path/'.cache'/'seqrec_nb'
    monkeypatch.setattr(sources.Path, 'home', lambda: (_ for _ in ()).throw(RuntimeError('no home')))
    assert sources.cache_dir().name == 'seqrec_nb'
    monkeypatch.setenv('XDG_CACHE_HOME', '/x'); assert str(sources.cache_dir()) == '/x/seqrec_nb'
    monkeypatch.setenv('SEQREC_CACHE', '/y'); assert str(sources.cache_dir()) == '/y'

def test_registry_is_sound():
    names = 'ml-100k ml-1m ml-20m ml-25m ml-32m ml-latest-small lastfm beauty sports toys yelp foursquare ml-1m-sasrec ml-1m-bsa'
    assert set(names.split()) == set(SOURCES)
    for name, s in SOURCES.items():
        assert s.name == name == name.lower() and s.site.startswith('https://') and s.layouts()
        assert all('interactions' in layout for layout in s.layouts())
        for a in s.archives:
            assert len(a.sha256) == 64 and int(a.sha256, 16) and a.size > 10_000
            assert a.address.startswith(('https://', 'pypi:'))
    assert [a.address.split(':')[0] for a in SOURCES['ml-100k'].archives] == ['https', 'pypi']
