"""The routes: what a request may contain, and how it is answered."""
