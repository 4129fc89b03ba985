from fa3._view cimport ArrayView
