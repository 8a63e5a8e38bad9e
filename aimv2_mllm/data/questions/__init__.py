"""What trained models are judged by: questions with right answers, pictures with a class
each."""
