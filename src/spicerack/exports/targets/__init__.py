"""Where models go: a file declares one `exports.target.Target` as TARGET, which says under which names it is asked for,
what it holds, and how it is written.
"""
