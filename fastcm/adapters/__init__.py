"""Models of other libraries as networks under this package's protocol, and back into their folders.

A library is imported when it is needed, by the functions that read or write its files.
"""
