"""One page about a quantized folder, from what lies in it: what went in, what came out, what was traded.

    lens    a few weights of the model and the levels that they are rounded to, kept by `eval`
    facts   everything that is known, as JSON's types
    markup  HTML whose texts are escaped, in two languages
    charts  pictures, as HTML and SVG
    page    facts -> the page

The page is a pure function of the facts, and every number on it is one of theirs.
"""
