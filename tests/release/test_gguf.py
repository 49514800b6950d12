"""GGUF files: what is read back is what was written, and llama.cpp answers from them as transformers does."""

from concurrent.futures import ThreadPoolExecutor

from mini_symposium.release.gguf import converter


def test_two_threads_that_need_the_converter_on_a_fresh_cache_both_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MINI_SYMPOSIUM_CACHE", str(tmp_path))
    with ThreadPoolExecutor(2) as pool:
        both = [future.result() for future in (pool.submit(converter), pool.submit(converter))]
    assert both[0].is_file() and both[0] == both[1]
    assert list(tmp_path.glob("[!.]*")) == [both[0].parent]
