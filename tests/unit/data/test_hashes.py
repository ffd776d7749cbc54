import os

from trainer.data.hashes import ContentHashes, content_hash


def test_a_settled_file_is_read_once_and_any_change_is_seen(tmp_path):
    file, cache = tmp_path / "a.txt", tmp_path / "hashes.json"
    file.write_text("one")
    reads = []

    def reading(path):
        reads.append(path)
        return content_hash(path)

    def settled():
        """Hashes as they are some time after the file was written."""
        hashes = ContentHashes(cache)
        status = file.stat()
        hashes.remember(file, status, content_hash(file))
        hashes.save()

    # just written: may change again within the resolution of the clock
    hashes = ContentHashes(cache)
    assert hashes.of(file, reading) == hashes.of(file, reading)
    assert len(reads) == 2
    settled()
    first = ContentHashes(cache).of(file, reading)
    assert len(reads) == 2
    # another content of the same size, with the time set back
    before = file.stat()
    file.write_text("two")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert ContentHashes(cache).of(file, reading) != first
    assert len(reads) == 3


def test_a_damaged_cache_is_no_cache(tmp_path):
    (tmp_path / "hashes.json").write_text("{")
    (tmp_path / "a").write_text("x")
    assert ContentHashes(tmp_path / "hashes.json").of(tmp_path / "a") == content_hash(tmp_path / "a")
