from mini_symposium.playground.blind import BlindTest, sentence, votes_to_decide


def cells(queries: int, first=("base", "qa"), second=("1e-03/epoch-2", "qa")) -> list[dict]:
    sides = (first, second)
    return [
        {"model": model, "format": form, "query": f"Query {n}", "answer": f"{model} in {form} says {n}"}
        for model, form in sides
        for n in range(queries)
    ]


def test_the_order_is_hidden_and_drawn_for_each_pair_and_a_vote_counts_for_the_side_behind_it():
    test, left = BlindTest(cells(40)), []
    while shown := test.shown:
        assert sorted(shown) == [f"1e-03/epoch-2 in qa says {len(left)}", f"base in qa says {len(left)}"]
        left.append(shown[0].startswith("base"))
        test.vote(shown.index(next(text for text in shown if text.startswith("base"))))
    assert 0 < sum(left) < 40  # both orders came up; by chance they do not once in 5e11
    found = test.result()
    assert found["wins"] == [40, 0] and found["share"] == 0 and found["high"] < 0.1 and found["decided"]
    assert [vote["query"] for vote in found["votes"]] == [f"Query {n}" for n in range(40)]


def test_few_votes_decide_nothing_and_it_is_said_how_many_would():
    test = BlindTest(cells(4))
    test.vote(None)
    assert "Nobody chose" in sentence(test.result())
    for _ in range(3):
        test.vote(test.orders[len(test.votes)].index(1))
    found = test.result()
    assert found["wins"] == [0, 3] and found["no_difference"] == 1 and test.shown is None
    assert round(found["low"], 3) == round(0.025 ** (1 / 3), 3) and found["high"] == 1
    assert not found["decided"] and found["votes_to_decide"] == 6
    assert "at this share, 6 votes would" in sentence(found)


def test_so_many_votes_decide_and_one_less_does_not():
    from scipy.stats import binomtest

    for k, n in ((7, 10), (3, 10), (11, 20)):
        votes, more = votes_to_decide(k, n), max(k, n - k)
        lows = [binomtest(v * more // n, v).proportion_ci().low for v in (votes - 1, votes)]
        assert lows[0] <= 0.5 < lows[1]
