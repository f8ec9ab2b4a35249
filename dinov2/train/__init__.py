"""Training: the student-teacher step, its schedules, and the loop around them."""
