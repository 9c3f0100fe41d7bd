"""Put prefixes in front of attention; the only package that touches transformers' attention, cache and masks."""
