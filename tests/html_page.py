"""HTML as a browser reads it, for tests that look at tables and cards; and buttons of widgets, pressed by name."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """What a browser makes of it: text per cell, tags and attributes."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.attributes, self.rows, self.text = set(), set(), [], ""
        self.depth = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.depth += [tag] * (tag not in ("br", "wbr"))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "br":
            self.handle_data("\n")

    def handle_endtag(self, tag):
        assert self.depth.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "td" in self.depth or "th" in self.depth:
            self.rows[-1][-1] += data


def press(page, name: str) -> None:
    """Press the button `name` of a playground, or of a box of widgets."""

    def buttons(widget):
        for child in getattr(widget, "children", ()):
            yield from [child] if getattr(child, "description", "") == name else buttons(child)

    next(buttons(getattr(page, "box", page))).click()
