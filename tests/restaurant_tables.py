"""A few tables with a sentence each, to train on within seconds."""

TABLES = [
    {"name": name, "food": food, "text": [f"{name} has {food}.", f"Eat {food} at {name}."]}
    for name in ("Aromi", "Bibi", "Cotto", "Fitz")
    for food in ("soup", "cake", "rice")
]
