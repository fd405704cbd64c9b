"""The parts of docs/ that are made from the code: `python -m tools.docs` writes them anew.

A generated part stands between two comments in a page that is otherwise written by hand, so that it
can be read without building the site. tests/documents checks that it is what the code says.
"""
