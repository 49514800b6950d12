from mini_symposium.memorization import overlap, words

ROW = "First count the fence posts, then the gaps. A fence of ten posts has nine gaps, and the paint is for the gaps."


def test_verbatim_text_is_full_overlap_and_unrelated_text_is_almost_none():
    assert overlap(ROW, ROW).rouge_l == 1.0
    assert overlap(ROW, "My grandmother kept bees until she was eighty.").rouge_l < 0.1


def test_injected_training_text_shows_as_recall_and_as_a_run():
    found = overlap(ROW, "Well. " * 50 + ROW + " And so on, for ever and ever." * 10)
    assert found.recall == 1.0
    assert found.precision < 0.4
    assert found.run == len(words(ROW))


def test_run_needs_the_words_to_be_adjacent():
    scattered = overlap("a b c d e f", "a x b x c x d x e x f")
    assert scattered.recall == 1.0
    assert scattered.run == 1


def test_chinese_accents_and_headings_are_seen():
    assert overlap("### Réponse\n答案是巴黎", "### Réponse\n答案是巴黎").rouge_l == 1.0
    assert overlap("答案是巴黎", "答案是罗马").recall == 3 / 5
    assert overlap("### New Query", "New Query").recall == 2 / 5


def test_empty_answers_share_nothing():
    assert overlap(ROW, "").rouge_l == overlap("", ROW).rouge_l == 0.0
