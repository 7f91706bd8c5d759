"""Head models (procedural, ICT-FaceKit, FLAME), their parameters, and `load_head`, the one door to them."""
