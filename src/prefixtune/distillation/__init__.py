"""Put a document, a prompt or a teacher into a prefix: questions, the teacher's answers, training, a report."""
