"""The job that `gguf.ask` gives to llama.cpp's server, and the replies that come back."""

from mini_symposium.models.base_files import local_directory
from mini_symposium.release.gguf import ask, to_gguf


def test_an_answer_ends_at_its_own_stop_string_or_at_the_limit(tmp_path):
    file = tmp_path / "tiny.gguf"
    to_gguf(local_directory("tiny"), file, "f32")
    prompts = ["Hello", "\N{HORSE}" * 300]  # several tokens a character: the context must have room for them
    whole, horses = ask(file, prompts, [[], []], 6)
    assert whole.stop_reason == "length" and len(whole.ids) == 6
    assert len(horses.prompt_ids) > 600 and len(horses.ids) == 6
    stop = whole.text[3:6]
    cut, again = ask(file, ["Hello", "Hello"], [[stop], []], 6)
    assert again == whole
    assert cut.stop_reason == "stop string" and cut.text == whole.text.partition(stop)[0]
