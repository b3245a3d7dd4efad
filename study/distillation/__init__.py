"""What the study exists for: objectives, layer mappings, and training students by them."""
