"""What is trained and where it is read: teachers, students and the taps on both."""
