from rlring.plan.command import main

raise SystemExit(main())
