"""Serving over HTTP. `server` and what it uses know no Ray; `app` puts it on Ray Serve."""
