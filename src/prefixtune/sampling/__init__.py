"""How tokens are chosen, when a text ends, and tokens as text: for every loop over tokens. Runs no model."""
