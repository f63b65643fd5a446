from rlring.bench.command import main

raise SystemExit(main())
