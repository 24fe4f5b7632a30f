"Named data sets: where they are looked for, how they are fetched, and what a bad server or archive can do (nothing)."
import io, os, re, shutil, socket, ssl, subprocess, threading, zipfile
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import URLError
from urllib.request import HTTPRedirectHandler
import pytest
from seqrec_nb import download
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
        def ask(url, start, size):
            download.check_address(url, http=False)
            asked.append(url)
            data = answers.pop(0) if answers else answer
            if isinstance(data, Exception): raise data
            return (data if hasattr(data, 'read') else io.BytesIO(data)), 0
        monkeypatch.setattr(download, 'ask', ask)
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
    assert sources.cache_dir().name == f'seqrec_nb-{os.getuid()}'
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

# a server that misbehaves, on this machine: each path is a way to answer

class Answer(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.0'
    def log_message(self, *args): pass
    def do_GET(self):
        host, wish = self.server, self.headers.get('Range')
        way, _, rest = self.path[1:].partition('/')
        start, size = int(wish[6:-1]) if wish else 0, len(host.content)
        host.asked.append((way, start))
        if way == 'to': return self.head(302, Location=rest)
        if way == 'ring': return self.head(302, Location=self.path)
        if way == 'impossible' and wish: return self.head(416)
        if way == 'gone': return self.head(404)
        whole = not wish or way == 'whole'
        told = dict(shifted=f'bytes {start - 1}-{size - 2}/{size}', larger=f'bytes {start}-{size - 1}/{size + 9}').get(way)
        body = host.content if whole else host.content[start - 1:-1] if way == 'shifted' else host.content[start:]
        parts = {} if whole else {'Content-Range': told or f'bytes {start}-{size - 1}/{size}'}
        self.head(200 if whole else 206, **{'Content-Length': len(body)}, **parts)
        cut = host.cuts.pop(0) if host.cuts else len(body)
        self.wfile.write(body[:cut]); self.wfile.flush()
        if way == 'stall' and cut < len(body): host.done.wait(5)
    def head(self, status, **fields):
        self.send_response(status)
        for k, v in fields.items(): self.send_header(k, str(v))
        self.end_headers()

def open_host(content=TOY):
    "A server on a free port: what it serves, where it hangs up (`cuts`), and what it was asked"
    host = ThreadingHTTPServer(('127.0.0.1', 0), Answer)
    host.daemon_threads, host.content, host.cuts, host.asked, host.done = True, content, [], [], threading.Event()
    host.url = f'http://127.0.0.1:{host.server_port}/'
    threading.Thread(target=host.serve_forever, args=(.02,), daemon=True).start()
    return host

@pytest.fixture
def host(monkeypatch, tmp_path):
    "A misbehaving server, plain http asked for, and an empty cache; `put` registers the toy set at some ways"
    monkeypatch.setenv('SEQREC_CACHE', str(tmp_path/'cache')); monkeypatch.setenv('no_proxy', '*')
    monkeypatch.setenv('SEQREC_PLAIN_HTTP', '1'); monkeypatch.delenv('SEQREC_DATA', raising=False)
    host = open_host()
    def put(*ways, data=TOY, url=host.url):
        first, *more = (w if ':' in w.partition('/')[0] else url + w for w in ways)
        a = Archive(first, sha256(data).hexdigest(), len(data), dict(interactions='toy/ratings.csv'), tuple(more))
        monkeypatch.setitem(SOURCES, 'toy', Source('toy', 'https://example.org', archives=(a,)))
    host.put, host.cache = put, tmp_path/'cache'
    yield host
    host.done.set(); host.shutdown(); host.server_close()

def got(host):
    "The toy set is found, is right, and nothing else is left"
    return find('toy')['interactions'].read_bytes() == ROWS and left_over(host.cache) == ['toy/ratings.csv']

def test_a_broken_line_is_continued(host):
    host.put('parts'); host.cuts = [100, 50, 60]
    assert got(host) and host.asked == [('parts', 0), ('parts', 100), ('parts', 150), ('parts', 210)]

def test_a_try_that_brings_nothing_is_the_last_and_what_came_stays(host):
    host.put('parts'); host.cuts = [100, 0]
    with pytest.raises(SourceError, match='line broke after 100 of'): find('toy')
    part, = left_over(host.cache)
    assert part.endswith('.part') and (host.cache/part).read_bytes() == TOY[:100]
    host.asked.clear()
    assert got(host) and host.asked == [('parts', 100)], 'the next call continues it'

@pytest.mark.parametrize('way', ['whole', 'impossible', 'shifted', 'larger'])
def test_without_the_wanted_part_all_is_fetched(host, way):
    "A server that ignores Range, finds it impossible, or sends another part or a part of another file"
    host.put(way); host.cuts = [100]
    assert got(host) and host.asked[:2] == [(way, 0), (way, 100)]

def test_only_the_look_at_content_range_keeps_a_shifted_part_out(host, monkeypatch):
    host.put('shifted'); host.cuts = [100]
    monkeypatch.setattr(download, 'ask', lambda address, start, size: (download.opener().open(
        download.Request(address, headers={'Range': f'bytes={start}-'} if start else {})), start))
    find('toy')     # the hash notices, and all is fetched once more
    assert host.asked == [('shifted', 0), ('shifted', 100), ('shifted', 0)]

def test_a_file_that_changed_in_between(host):
    "The first part of one file and the rest of another: the hash notices, the whole is fetched again"
    host.put('parts'); host.cuts = [100]
    host.content = b'?' * len(TOY)
    real, n = download.more, []
    def more(*args):
        n.append(1)
        if len(n) == 2: host.content = TOY
        return real(*args)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(download, 'more', more)
        assert got(host)
    assert host.asked == [('parts', 0), ('parts', 100), ('parts', 0)]

def test_only_the_hash_keeps_a_wrong_file_out(host, monkeypatch):
    wrong = zipped(toy__ratings_csv=ROWS.replace(b'1,2,3', b'6,6,6'))
    host.content = wrong
    host.put('parts', data=TOY)
    with pytest.raises(SourceError): find('toy')
    host.put('parts', data=wrong); host.asked.clear()
    monkeypatch.setattr(download, 'sha256', lambda path: sha256(wrong).hexdigest())   # the guard taken away
    assert b'6,6,6' in find('toy')['interactions'].read_bytes()

def test_mirrors_are_tried_in_order_and_continue_what_there_is(host):
    host.put('gone', 'parts', 'whole'); host.cuts = [100, 0]      # the 404 takes none
    assert got(host) and host.asked == [('gone', 0), ('parts', 0), ('parts', 100), ('whole', 100)]

def test_every_failure_is_shown(host):
    host.content = TOY[:-1] + b'?'
    host.put('gone', 'ftp://example.org/x.zip', 'parts')
    with pytest.raises(SourceError) as e: find('toy')
    for part in ['/gone: HTTP Error 404', 'ftp://example.org/x.zip: ', 'only https', '/parts: came twice', sha256(TOY).hexdigest(), sha256(host.content).hexdigest()]:
        assert part in str(e.value), part

def test_a_silent_server_is_left(host, monkeypatch):
    monkeypatch.setattr(download, 'TIMEOUT', .1)
    host.content = bytes(300_000)
    host.put('stall', data=host.content); host.cuts = [200_000, 0]
    with pytest.raises(SourceError, match='timed out'): find('toy')
    (first, then), part = host.asked, left_over(host.cache)[0]
    assert first == ('stall', 0) and then[1] == (host.cache/part).stat().st_size > 100_000, 'what came is kept, up to a block'

def test_plain_http_is_served_only_when_asked_for(host, monkeypatch):
    host.put('parts')
    for value in ('0', 'no', ''):
        monkeypatch.setenv('SEQREC_PLAIN_HTTP', value)
        with pytest.raises(SourceError, match='SEQREC_PLAIN_HTTP=1'): find('toy')
    assert host.asked == []
    monkeypatch.setenv('SEQREC_PLAIN_HTTP', '1')
    assert got(host)

@pytest.mark.parametrize('target', ['file:///etc/passwd', 'ftp://127.0.0.1/x', 'data:text/plain,x', 'gopher://x/'])
def test_redirects_lead_to_no_other_scheme(host, target):
    host.put('to/' + target)
    with pytest.raises(SourceError, match='not allowed|refused|only https'): find('toy')
    assert len(host.asked) == 1

def test_a_redirect_to_another_host_is_followed_and_the_hash_decides(host):
    other = open_host()
    host.put(f'to/{other.url}parts'); other.cuts = [100]
    assert got(host) and other.asked == [('parts', 0), ('parts', 100)], 'also for the rest of a file'
    shutil.rmtree(host.cache)
    other.content = TOY[:-1] + b'?'
    with pytest.raises(SourceError, match='wrong content'): find('toy')
    other.shutdown(); other.server_close()

def test_a_ring_of_redirects_ends(host):
    host.put('ring')
    with pytest.raises(SourceError, match='infinite loop'): find('toy')
    assert 1 < len(host.asked) < 15

@pytest.fixture(scope='module')
def certificate(tmp_path_factory):
    "A certificate for 127.0.0.1 that nobody has signed but itself"
    folder = tmp_path_factory.mktemp('tls')
    if not shutil.which('openssl'): pytest.skip('there is no openssl command to make a certificate with')
    subprocess.run(['openssl', 'req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes', '-days', '2', '-subj', '/CN=localhost',
                    '-addext', 'subjectAltName=IP:127.0.0.1', '-keyout', folder/'key', '-out', folder/'cert'], check=True, capture_output=True)
    return folder

@pytest.fixture
def secure(host, certificate):
    "A second server that speaks TLS"
    other, context = open_host(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate/'cert', certificate/'key')
    other.socket = context.wrap_socket(other.socket, server_side=True)
    other.url = other.url.replace('http:', 'https:')
    yield other
    other.done.set(); other.shutdown(); other.server_close()

def test_https_needs_a_certificate_that_is_trusted(host, secure, certificate, monkeypatch):
    monkeypatch.setenv('SEQREC_PLAIN_HTTP', '0')
    host.put('parts', url=secure.url)
    with pytest.raises(SourceError, match='CERTIFICATE_VERIFY_FAILED'): find('toy')
    assert secure.asked == []
    monkeypatch.setenv('SSL_CERT_FILE', str(certificate/'cert'))
    assert got(host) and secure.asked == [('parts', 0)]

def test_https_never_leads_to_http(host, secure, certificate, monkeypatch):
    "Not even where http is allowed; with urllib's own handler it would"
    monkeypatch.setenv('SSL_CERT_FILE', str(certificate/'cert'))
    host.put(f'to/{host.url}parts', url=secure.url)
    with pytest.raises(SourceError, match='only https'): find('toy')
    assert host.asked == [] and left_over(host.cache) == []
    monkeypatch.setattr(download, 'Redirects', HTTPRedirectHandler)
    assert got(host) and host.asked == [('parts', 0)]

def test_nothing_of_an_address_that_may_be_secret_is_shown(host, capfd):
    host.put('https://user:' + 'pa55word@127.0.0.1:1/x.zip?signature=s1gned#s1gned')
    with pytest.raises(SourceError) as e: find('toy')
    told = str(e.value) + capfd.readouterr().err
    assert '127.0.0.1:1/x.zip' in told and not re.search('pa55|s1gned', told)

def test_a_second_process_takes_a_file_of_its_own(tmp_path):
    with download.partial(tmp_path, 'a' * 64) as mine:
        mine.write_bytes(b'half')
        with download.partial(tmp_path, 'a' * 64) as other:
            assert other != mine and not other.exists()
            other.write_bytes(b'x')
    assert left_over(tmp_path) == [mine.name] and mine.read_bytes() == b'half'
    with download.partial(tmp_path, 'a' * 64) as again: os.truncate(again, 0)
    assert left_over(tmp_path) == []

def test_a_full_disk_keeps_the_download(host, monkeypatch):
    host.put('parts')
    def full(*args): raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(sources, 'extract', full)
        with pytest.raises(SourceError, match='No space left'): find('toy')
    host.asked.clear()
    assert got(host) and host.asked == [], 'it was all there'

def test_a_cache_of_somebody_else_is_refused(monkeypatch, tmp_path):
    "The temporary directory is everybody's: whoever makes our folder there before us could fill it"
    for k in ('SEQREC_CACHE', 'XDG_CACHE_HOME', 'SEQREC_DATA'): monkeypatch.delenv(k, raising=False)
    monkeypatch.setattr(sources.Path, 'home', lambda: (_ for _ in ()).throw(RuntimeError('no home')))
    monkeypatch.setattr(sources, 'gettempdir', lambda: str(tmp_path))
    me = os.getuid()
    assert sources.cache_dir() == tmp_path/f'seqrec_nb-{me}'
    (tmp_path/f'seqrec_nb-{me + 1}').mkdir()
    monkeypatch.setattr(os, 'getuid', lambda: me + 1)
    with pytest.raises(SourceError, match='belongs to somebody else'): sources.cache_dir()

# archives

def test_only_the_bound_keeps_a_bomb_out(world, monkeypatch):
    bomb = zipped(toy__ratings_csv=bytes(20_000_000))
    world(archive(bomb, interactions='toy/ratings.csv'), answer=bomb)
    with pytest.raises(SourceError, match='refused'): find('toy')
    monkeypatch.setattr('seqrec_nb.untrusted.RATIO', 10**9)
    assert find('toy')['interactions'].stat().st_size == 20_000_000

def twice():
    "A zip file with one name twice: readers differ in which of them they take"
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as z:
        for text in (ROWS, b'other'):
            with pytest.MonkeyPatch.context() as m:
                m.setattr('warnings.warn', lambda *a, **k: None)
                z.writestr('toy/ratings.csv', text)
    return out.getvalue()

def patched(data, *changes):
    "Bytes with some replaced: (what, by what), everywhere"
    for old, new in changes: assert old in data; data = data.replace(old, new)
    return data

def stored(name='toy/ratings.csv', data=ROWS):
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as z: z.writestr(zipfile.ZipInfo(name), data)
    return out.getvalue()

def flagged(bits):
    "A zip file whose member has other general-purpose flags"
    data = bytearray(stored())
    for mark, at in ((b'PK\3\4', 6), (b'PK\1\2', 8)): data[data.index(mark) + at] |= bits
    return bytes(data)

def link():
    info = zipfile.ZipInfo('toy/ratings.csv'); info.external_attr = 0o120777 << 16
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as z: z.writestr(info, '/etc/passwd')
    return out.getvalue()

def method(n):
    "A zip file that claims another way of packing"
    data = bytearray(stored())
    for mark, at in ((b'PK\3\4', 8), (b'PK\1\2', 10)): data[data.index(mark) + at] = n
    return bytes(data)

HOSTILE = {'a name twice': (twice, '2 times'), 'encrypted': (lambda: flagged(1), 'is encrypted'), 'a link': (link, 'is a link'),
           'other bytes than the checksum says': (lambda: patched(stored(), (b'1,2,3', b'9,9,9')), 'Bad CRC'),
           'a size that is not true': (lambda: stored()[:-60] + b'\0' * 40, 'not a zip file'),
           'an unknown way of packing': (lambda: method(99), 'cannot be unpacked'), 'broken packing': (lambda: method(8), 'decompressing|invalid'),
           'a tar file': (lambda: b'\0' * 10240, 'not a zip file'), 'no zip file': (lambda: b'\x1f\x8b' + bytes(99), 'not a zip file')}

@pytest.mark.parametrize('kind', HOSTILE)
def test_hostile_archives_are_refused_by_name(world, kind):
    make, why = HOSTILE[kind]
    data = make()
    world(archive(data, interactions='toy/ratings.csv'), answer=data)
    with pytest.raises(SourceError, match=why): find('toy')
    assert left_over(world.cache) == []
