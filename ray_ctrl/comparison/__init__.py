"""Methods compared on one set of requests of which the outcomes of all plans are known."""
