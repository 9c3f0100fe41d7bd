"""The routes: what a request may say, and what is answered."""
